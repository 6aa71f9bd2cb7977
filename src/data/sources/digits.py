"""Handwritten digits with the words for them.

The images are scikit-learn's 1797 digits (UCI Optical Recognition of Handwritten Digits, 8 x 8, 17 grey levels), read
from the file in its package without importing it. 360 of them, 36 of each digit, are held out for good.
"""

from __future__ import annotations

import functools
import gzip
import importlib.util
import pathlib
from typing import NamedTuple

import numpy as np

from src.data.example import Example
from src.data.images import shift_images, shifts
from src.data.sources.numbers import WORDS, phrases, texts
from src.data.splits import check_split

SIZE = 8
SHAPE = (SIZE, SIZE, 1)
BACKGROUND = -1.0
HELD_OUT_OF_EACH = 36


class _Images(NamedTuple):
    """`values` [n, 8, 8, 1] float32 in [-1, 1], background -1; `labels` [n] int64 in 0 .. 9."""

    values: np.ndarray
    labels: np.ndarray


@functools.cache
def load(split: str) -> _Images:
    """The images of "train" (1437) or "test" (360), a stratified split that depends on nothing.

    Raises FileNotFoundError if scikit-learn's file is not there, ValueError for another split.
    """
    check_split(split)
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
    return _Images(values, labels[kept])


def caption(digit: int) -> str:
    """The canonical caption, "a handwritten seven"."""
    return phrases(digit)[0]


class Digits:
    """`image`, float32 [8, 8, 1] in [-1, 1], its `label`, and as `caption` all phrases for it, the canonical one first.

    shift   training images are moved at random by at most so many pixels
    """

    holds = "values"
    held_out = 10 * HELD_OUT_OF_EACH
    draws = 2
    classes = tuple({"id": str(digit), "name": WORDS[digit]} for digit in range(10))

    def __init__(self, *, shift: int = 1):
        self.shift = shift

    def __len__(self) -> int:
        return len(load("train").labels) + self.held_out

    def __getitem__(self, number: int) -> Example:
        trained = len(load("train").labels)
        images, row = (load("train"), number) if number < trained else (load("test"), number - trained)
        label = int(images.labels[row])
        return Example({"image": images.values[row], "label": label, "caption": phrases(label)}, f"digit {number}")

    def drawn(self, number: int, uniforms: np.ndarray) -> Example:
        """The example, its image shifted: the uniform numbers are down, right."""
        example = self[number]
        if self.shift:
            offsets = shifts(uniforms[None], self.shift)
            example["image"] = shift_images(example["image"][None], offsets, BACKGROUND)[0]
        return example

    def every(self, name: str) -> list[str]:
        """All captions."""
        return [phrase for digit in range(10) for phrase in phrases(digit)]

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer of digits and numbers is trained on, the same for both sources."""
        return texts()
