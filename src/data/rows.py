"""What the small tasks share: text rows in tables, random shifts, and the rest of the `Task` contract.

A text segment is left aligned and padded on the right inside the segment, where `valid` is False. All texts of a task
are encoded once, into a table; a batch of text is then one numpy look-up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from src.data.pipeline.stream import iterate
from src.interfaces import Field, ImageField, LabelField, TokenField
from src.sequence.layout import Segment

SPLITS = ("train", "test")
CHARACTERS = 32  # of a text that are looked at for each token that it may have
Parts = Iterable[tuple[Iterable[int], bool]]  # (ids, are they targets of a text objective?)


@dataclasses.dataclass(frozen=True)
class TextTable:
    """T texts of one segment: `ids` [T, N] int32, `valid` [T, N], `loss` [T, N]."""

    ids: np.ndarray
    valid: np.ndarray
    loss: np.ndarray

    def take(self, rows: np.ndarray) -> TokenField:
        """Field of the texts `rows` [B]."""
        return TokenField(self.ids[rows], self.valid[rows], self.loss[rows])


def text_table(texts: Sequence[Parts], pad: int, length: int | None = None) -> TextTable:
    """Table of texts given as parts; `length` defaults to the longest.

    Raises ValueError if a text is longer than `length`.
    """
    rows = [[(int(i), target) for ids, target in parts for i in ids] for parts in texts]
    longest = max(len(row) for row in rows)
    length = longest if length is None else length
    if longest > length:
        raise ValueError(f"the longest text has {longest} tokens but its segment has {length}: give a larger length")
    table = TextTable(
        np.full((len(rows), length), pad, np.int32),
        np.zeros((len(rows), length), bool),
        np.zeros((len(rows), length), bool),
    )
    for row, tokens in enumerate(rows):
        table.ids[row, : len(tokens)] = [i for i, _ in tokens]
        table.valid[row, : len(tokens)] = True
        table.loss[row, : len(tokens)] = [target for _, target in tokens]
    return table


def tail_table(codec: Any, newline: bool) -> TextTable:
    """What follows a drawn image: <|im_end|> </s>, with `newline` a line break between them, in 4 places."""
    between = codec.encode("\n") if newline else ()
    return text_table([[([codec.image_end, *between, codec.eos], False)]], codec.pad, 4 if newline else 2)


def text_length(name: str, longest: int, fixed: int, total: int | None) -> int:
    """Length of the task's one flexible text segment: `longest`, or what the `fixed` tokens leave of `total`.

    Raises ValueError if `total` leaves less than `longest`.
    """
    if total is None:
        return longest
    if total - fixed < longest:
        raise ValueError(f"task {name}: length={total} is too short, its longest row has {fixed + longest} tokens")
    return total - fixed


def image_tokens(height: int, width: int, patch: int) -> int:
    """Number of tokens of an image.

    Raises ValueError when the patch does not divide the image.
    """
    if patch < 1 or height % patch or width % patch:
        raise ValueError(f"patch size {patch} does not divide an image of {height} x {width}: choose a common divisor")
    return (height // patch) * (width // patch)


def choose(uniform: np.ndarray, count: int) -> np.ndarray:
    """Uniform choices in 0 .. count-1 from uniform numbers in [0, 1)."""
    return (uniform * count).astype(np.int64)


def shift_images(images: np.ndarray, offsets: np.ndarray, background: float) -> np.ndarray:
    """Images [B, h, w, C] moved by whole pixels, `offsets` [B, 2] down and right; what enters is `background`."""
    count, height, width, _ = images.shape
    margin = int(np.abs(offsets).max(initial=0))
    pad = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(images, pad, constant_values=background)
    rows = np.arange(height)[None] + margin - offsets[:, :1]
    columns = np.arange(width)[None] + margin - offsets[:, 1:]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def shifts(uniforms: np.ndarray, most: int) -> np.ndarray:
    """Offsets in -most .. most from uniform numbers in [0, 1), same shape."""
    return choose(uniforms, 2 * most + 1) - most


def check_split(name: str, split: str) -> None:
    """Raises ValueError for a split that is not one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"task {name} has no split {split!r}: use one of {', '.join(SPLITS)}")


class RowTask:
    """A task whose rows are functions of (index, uniform numbers): see `source.Source` for `rows` and `build`.

    Subclasses set `codec` (None without text), `segments`, and where they apply `image_shape` (h, w, C), `vision` (the
    encoder of images that are understood), `targets` (names of the text segments with a loss) and `classes` (number of
    classes; adds the field `label`).
    """

    name: ClassVar[str] = "task"
    draws: ClassVar[int] = 0

    codec: Any = None
    segments: tuple[Segment, ...] = ()
    image_shape: tuple[int, int, int] | None = None
    vision: Any = None
    targets: frozenset[str] = frozenset()
    classes: int | None = None

    @property
    def length(self) -> int:
        """Tokens of one row, over all segments."""
        return sum(segment.length for segment in self.segments)

    def rows(self, split: str) -> int:
        """Number of rows of a split; an epoch of "train", the whole pass of "test"."""
        raise NotImplementedError

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """Nothing: these tasks hold their data in memory."""
        return {}

    def blank(self) -> dict[str, np.ndarray]:
        """What `read` gives, of the same shapes, for a row that it refused."""
        return {}

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows `index` [B]; `uniforms` [B, draws], None in the ordered pass."""
        raise NotImplementedError

    def element_spec(self, batch: int) -> dict[str, Field]:
        """The fields of a batch as shapes and dtypes (jax.ShapeDtypeStruct), without touching any data."""
        spec: dict[str, Field] = {}
        for segment in self.segments:
            if segment.kind == "text":
                ids, flags = ((batch, segment.length), np.int32), ((batch, segment.length), np.bool_)
                spec[segment.name] = TokenField(*(jax.ShapeDtypeStruct(*leaf) for leaf in (ids, flags, flags)))
            elif segment.kind in ("image", "vision"):
                shape = self.image_shape if segment.kind == "image" else self.vision.shape
                values, valid = ((batch, *shape), np.float32), ((batch,), np.bool_)
                spec[segment.name] = ImageField(*(jax.ShapeDtypeStruct(*leaf) for leaf in (values, valid)))
        if self.classes is not None:
            spec["label"] = LabelField(jax.ShapeDtypeStruct((batch,), np.int32))
        return spec

    def iterator(
        self, split: str, batch: int, seed: int, shard: tuple[int, int] = (0, 1)
    ) -> Iterator[dict[str, Field]]:
        """Endless shuffled batches of "train", one ordered pass over "test"; `batch` counts all processes' rows.

        Raises ValueError for an unknown split or a batch that the processes cannot share evenly.
        """
        check_split(self.name, split)
        return iterate(self, split, batch, seed, shard)

    def fake(self, batch: int, seed: int) -> dict[str, Field]:
        """Random rows of the same spec: at least one valid token a text, losses only where the task has some."""
        rng = np.random.default_rng(seed)
        rows: dict[str, Field] = {}
        for name, field in self.element_spec(batch).items():
            if isinstance(field, TokenField):
                shape = field.ids.shape
                valid = np.arange(shape[1]) < rng.integers(1, shape[1] + 1, (batch, 1))
                ids = np.where(valid, rng.integers(0, self.codec.vocab_size, shape), self.codec.pad)
                rows[name] = TokenField(ids.astype(np.int32), valid, valid & (name in self.targets))
            elif isinstance(field, ImageField):
                values = rng.standard_normal(field.values.shape).astype(np.float32)
                rows[name] = ImageField(values, np.ones(batch, bool))
            else:
                rows[name] = LabelField(rng.integers(0, self.classes + 1, (batch,)).astype(np.int32))
        return rows


class PromptTask(RowTask):
    """Words, then an image: prompt(text) = <s> words <|im_start|>, image, tail(text) = <|im_end|> </s>.

    `drop` is the probability that the words of a training row are left out, <s> <|im_start|>, for guidance. There is no
    text loss unless `text_loss`: then on the words and <|im_start|> of undropped rows, and on the last </s>.

    Row T of the prompt table is the empty prompt, T the number of `phrases`; subclasses choose the other rows.
    """

    def __init__(
        self,
        codec: Any,
        phrases: Sequence[str],
        image_shape: tuple[int, int, int],
        patch: int,
        *,
        image_mode: str = "bidirectional",
        length: int | None = None,
        drop: float = 0.1,
        text_loss: bool = False,
    ):
        tokens = image_tokens(*image_shape[:2], patch)
        self.codec, self.image_shape, self.drop, self.phrases = codec, image_shape, drop, tuple(phrases)
        self.targets = frozenset({"prompt", "tail"} if text_loss else ())
        start = ([codec.image_start], text_loss)
        texts = [[([codec.bos], False), (codec.encode(p), text_loss), start] for p in self.phrases]
        texts.append([([codec.bos, codec.image_start], False)])
        longest = text_table(texts, codec.pad).ids.shape[1]
        room = text_length(self.name, longest, tokens + 2, length)
        self.empty = len(self.phrases)
        self.prompt_table = text_table(texts, codec.pad, room)
        self.tail_table = text_table([[([codec.image_end], False), ([codec.eos], text_loss)]], codec.pad)
        self.segments = (
            Segment("prompt", "text", room),
            Segment("image", "image", tokens, image_mode),
            Segment("tail", "text", 2),
        )

    def texts_of(self, phrase: np.ndarray, dropped: np.ndarray) -> dict[str, TokenField]:
        """Fields `prompt` and `tail` of the phrases [B]; the words are left out where `dropped` [B]."""
        prompt = self.prompt_table.take(np.where(dropped, self.empty, phrase))
        return {"prompt": prompt, "tail": self.tail_table.take(np.zeros(len(phrase), np.int64))}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `prompt` [1, N] of any words; without words the empty prompt, for guidance.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        codec, length = self.codec, self.segments[0].length
        ids = [codec.bos, *(codec.encode(words) if words else ()), codec.image_start]
        return prompt_field(words, ids, length, codec.pad)


class CaptionTask(RowTask):
    """An image, then its caption: head(text) = <s> <|im_start|>, image, caption(text) = <|im_end|> caption </s>.

    The loss is on the caption's words and </s>.
    """

    targets = frozenset({"caption"})

    def __init__(
        self,
        codec: Any,
        captions: Sequence[str],
        image_shape: tuple[int, int, int],
        patch: int,
        *,
        image_mode: str = "bidirectional",
        length: int | None = None,
    ):
        tokens = image_tokens(*image_shape[:2], patch)
        self.codec, self.image_shape, self.captions = codec, image_shape, tuple(captions)
        texts = [[([codec.image_end], False), (codec.encode(c), True), ([codec.eos], True)] for c in self.captions]
        longest = text_table(texts, codec.pad).ids.shape[1]
        room = text_length(self.name, longest, tokens + 2, length)
        self.caption_table = text_table(texts, codec.pad, room)
        self.head_table = text_table([[([codec.bos, codec.image_start], False)]], codec.pad)
        self.segments = (
            Segment("head", "text", 2),
            Segment("image", "image", tokens, image_mode),
            Segment("caption", "text", room),
        )

    def texts_of(self, caption: np.ndarray) -> dict[str, TokenField]:
        """Fields `head` and `caption` of the captions [B]."""
        head = self.head_table.take(np.zeros(len(caption), np.int64))
        return {"head": head, "caption": self.caption_table.take(caption)}

    def fixed_texts(self) -> dict[str, TokenField]:
        """Fields [1, N] that are the same in every row and come before the image."""
        return {"head": self.head_table.take(np.zeros(1, np.int64))}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `caption` [1, N] as far as it is given: <|im_end|> and the first words, to be continued.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        codec, length = self.codec, self.segments[2].length
        ids = [codec.image_end, *(codec.encode(words) if words else ())]
        return prompt_field(words, ids, length, codec.pad)


def prompt_field(words: str, ids: Sequence[int], length: int, pad: int) -> TokenField:
    """One row `[1, length]` of a text that is given, so without loss.

    Raises ValueError if it does not fit.
    """
    if len(ids) > length:
        raise ValueError(f"prompt {words!r} takes {len(ids)} tokens but its segment has {length}: use fewer words")
    return text_table([[(ids, False)]], pad, length).take(np.zeros(1, np.int64))
