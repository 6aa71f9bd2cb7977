"""Handwritten digits with words: draw what is said, say what is drawn, and sentences about numbers.

The images are scikit-learn's 1797 digits (UCI Optical Recognition of Handwritten Digits, 8 x 8, 17 grey levels), read
from the file in its package without importing it. 360 of them, 36 of each digit, are held out for good.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from src.data.numbers import RELATIONS, WORDS, sentences
from src.data.rows import (
    CaptionTask,
    PromptTask,
    RowTask,
    check_split,
    choose,
    prompt_field,
    shift_images,
    shifts,
    text_length,
    text_table,
)
from src.interfaces import Field, ImageField, TokenField
from src.sequence.layout import Segment

SIZE = 8
SHAPE = (SIZE, SIZE, 1)
BACKGROUND = -1.0
HELD_OUT_OF_EACH = 36
PHRASES = (
    "a handwritten {w}",
    "a handwritten {d}",
    "the digit {w}",
    "the digit {d}",
    "the number {w}",
    "the number {d}",
    "draw {a} {w}",
    "draw {a} {d}",
    "an image of {a} {w}",
    "an image of {a} {d}",
    "{w}",
    "{d}",
)


class Images(NamedTuple):
    """`values` [n, 8, 8, 1] float32 in [-1, 1], background -1; `labels` [n] int64 in 0 .. 9."""

    values: np.ndarray
    labels: np.ndarray


@functools.cache
def load(split: str) -> Images:
    """The images of "train" (1437) or "test" (360), a stratified split that depends on nothing.

    Raises FileNotFoundError if scikit-learn's file is not there, ValueError for another split.
    """
    check_split("digits", split)
    found = importlib.util.find_spec("sklearn")
    folder = pathlib.Path(found.submodule_search_locations[0]) if found else pathlib.Path("sklearn")
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if not path.exists():
        raise FileNotFoundError(f"the digits {str(path)!r} are missing: pip install scikit-learn")
    with gzip.open(path) as file:
        cells = b",".join(file.read().split()).split(b",")
    table = np.array(cells, np.float32).reshape(-1, SIZE * SIZE + 1)
    labels = table[:, -1].astype(np.int64)
    held = np.zeros(len(labels), bool)
    # RandomState's stream is frozen in numpy for ever, so that the split is too.
    order = np.random.RandomState(0)
    for digit in range(10):
        held[order.permutation(np.flatnonzero(labels == digit))[:HELD_OUT_OF_EACH]] = True
    kept = held if split == "test" else ~held
    values = (table[kept, :-1] / 8.0 - 1.0).reshape(-1, *SHAPE)
    values.setflags(write=False)
    return Images(values, labels[kept])


def phrases(digit: int) -> list[str]:
    """All prompts for a digit, the canonical one first."""
    article = "an" if digit == 8 else "a"
    return [phrase.format(a=article, w=WORDS[digit], d=digit) for phrase in PHRASES]


def caption(digit: int) -> str:
    """The canonical caption, "a handwritten seven"."""
    return phrases(digit)[0]


@functools.cache
def texts() -> tuple[str, ...]:
    """All training text of the tasks in this file, for the tokenizer."""
    said = [p for digit in range(10) for p in phrases(digit)]
    return (*said, *(s.text for s in sentences("train")))


class CaptionToImage(PromptTask):
    """Words -> digit: fields prompt, image, tail (see `PromptTask`); every digit has the prompts `phrases`.

    Training rows: a random phrase for the image's label, dropped with probability `drop`, and a random shift of at most
    `shift` pixels. "test": the held-out images, phrase i mod number of phrases for row i.
    """

    name = "caption_to_image"
    draws = 4

    def __init__(self, codec: Any, *, patch: int = 2, shift: int = 1, **options: Any):
        super().__init__(codec, [p for digit in range(10) for p in phrases(digit)], SHAPE, patch, **options)
        self.shift = shift

    @staticmethod
    def texts() -> tuple[str, ...]:
        """All training text of this file's tasks."""
        return texts()

    def rows(self, split: str) -> int:
        """1437 of "train", 360 of "test"."""
        return len(load(split).labels)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: uniforms are phrase, drop, shift down, shift right."""
        images = load(split)
        if uniforms is None:
            phrase, dropped = index % len(PHRASES), np.zeros(len(index), bool)
        else:
            phrase, dropped = choose(uniforms[:, 0], len(PHRASES)), uniforms[:, 1] < self.drop
        fields = self.texts_of(images.labels[index] * len(PHRASES) + phrase, dropped)
        shift = None if uniforms is None else uniforms[:, 2:4]
        return {**fields, "image": ImageField(shifted(images.values[index], shift, self.shift))}

    def prompts(self, split: str) -> list[tuple[str, int]]:
        """(phrase, digit) pairs to generate from, all phrases of every digit; the phrases are not split."""
        check_split(self.name, split)
        return [(p, digit) for digit in range(10) for p in phrases(digit)]


class ImageToCaption(CaptionTask):
    """Digit -> words: fields head, image, caption (see `CaptionTask`), one canonical caption per digit."""

    name = "image_to_caption"
    draws = 2

    def __init__(self, codec: Any, *, patch: int = 2, shift: int = 1, **options: Any):
        super().__init__(codec, [caption(digit) for digit in range(10)], SHAPE, patch, **options)
        self.shift = shift

    @staticmethod
    def texts() -> tuple[str, ...]:
        """All training text of this file's tasks."""
        return texts()

    def rows(self, split: str) -> int:
        """1437 of "train", 360 of "test"."""
        return len(load(split).labels)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: uniforms are shift down, shift right."""
        images = load(split)
        values = shifted(images.values[index], uniforms, self.shift)
        return {**self.texts_of(images.labels[index]), "image": ImageField(values)}

    def prompts(self, split: str) -> list[tuple[np.ndarray, int]]:
        """(image [8, 8, 1], digit) pairs of the split."""
        check_split(self.name, split)
        images = load(split)
        return [(image, int(label)) for image, label in zip(*images, strict=True)]


class NumberSentences(RowTask):
    """Sentences about numbers: one field sentence(text) = <s> words </s>, loss on every token after <s>.

    `relations` chooses a smaller language (see data/numbers.py).
    """

    name = "number_sentences"
    targets = frozenset({"sentence"})

    def __init__(self, codec: Any, *, relations: Sequence[str] = tuple(RELATIONS), length: int | None = None):
        self.codec = codec
        self.sentences = {split: sentences(split, relations) for split in ("train", "test")}
        parts = {
            split: [[([codec.bos], False), (codec.encode(s.text), True), ([codec.eos], True)] for s in said]
            for split, said in self.sentences.items()
        }
        longest = text_table([*parts["train"], *parts["test"]], codec.pad).ids.shape[1]
        room = text_length(self.name, longest, 0, length)
        self._tables = {split: text_table(said, codec.pad, room) for split, said in parts.items()}
        self.segments = (Segment("sentence", "text", room),)

    @staticmethod
    def texts() -> tuple[str, ...]:
        """All training text of this file's tasks."""
        return texts()

    def rows(self, split: str) -> int:
        """Number of different sentences."""
        return len(self.sentences[split])

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Field of the sentences; nothing is random."""
        return {"sentence": self._tables[split].take(index)}

    def prompts(self, split: str) -> list[tuple[str, str]]:
        """(sentence without its answer, answer) pairs; each prompt has one right answer."""
        check_split(self.name, split)
        return [(s.prompt, s.answer) for s in self.sentences[split]]

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `sentence` [1, N] as far as it is given: <s> and the first words, to be continued.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        ids = [self.codec.bos, *(self.codec.encode(words) if words else ())]
        return prompt_field(words, ids, self.segments[0].length, self.codec.pad)


def shifted(images: np.ndarray, uniforms: np.ndarray | None, most: int) -> np.ndarray:
    """Images [B, h, w, 1] shifted at random by `uniforms` [B, 2], or as they are if None."""
    return images if uniforms is None or not most else shift_images(images, shifts(uniforms, most), BACKGROUND)
