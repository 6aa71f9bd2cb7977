"""Canvases of one to four handwritten digits on a 2 x 2 grid, with captions that say exactly what lies where.

Grammar (one caption per canvas, one canvas per caption; D is "zero" .. "nine"):

    one digit        D (top | bottom) (left | right)        seven top left
    one row          D left of D (top | bottom)             seven left of two bottom
    one column       D above D (left | right)               seven above two right
    the rest         half above half                        seven left of two above three left of one
    half             D left of D | D left | D right         seven left above two right

Held-out canvases are composed of held-out digits only.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np

from src.data.example import Example
from src.data.images import choose, shift_images, shifts
from src.data.sources import digits
from src.data.sources.numbers import WORDS
from src.data.sources.numbers import texts as digit_texts

EMPTY = -1
CELLS = ("top left", "top right", "bottom left", "bottom right")
_DIGITS = {word: digit for digit, word in enumerate(WORDS[:10])}
TEST_ROWS = 360


def cells(label: np.ndarray) -> dict[str, int]:
    """Digit by name of the cell (`CELLS`) of a label [4], row-major, -1 where the cell is empty."""
    return {cell: int(digit) for cell, digit in zip(CELLS, label, strict=True) if digit != EMPTY}


def caption(label: np.ndarray) -> str:
    """The caption of a label [4] (see the grammar above).

    Raises ValueError if all cells are empty.
    """
    names = ["" if digit == EMPTY else WORDS[int(digit)] for digit in label]
    filled = [i for i, name in enumerate(names) if name]
    if not filled:
        raise ValueError("a canvas without digits has no caption: fill at least one cell")
    if len(filled) == 1:
        return f"{names[filled[0]]} {CELLS[filled[0]]}"
    if filled in ([0, 1], [2, 3]):
        return f"{_half(*(names[i] for i in filled))} {'top' if filled[0] == 0 else 'bottom'}"
    if filled in ([0, 2], [1, 3]):
        return f"{names[filled[0]]} above {names[filled[1]]} {'left' if filled[0] == 0 else 'right'}"
    return f"{_half(*names[:2])} above {_half(*names[2:])}"


def _half(left: str, right: str) -> str:
    return f"{left} left of {right}" if left and right else f"{left} left" if left else f"{right} right"


def parse_caption(text: str) -> dict[str, int] | None:
    """Digit by cell name of a caption, or None if the text is no caption of the grammar; blanks are free."""
    return _meanings().get(" ".join(text.split()))


def labels(most: int = 4) -> np.ndarray:
    """All labels [n, 4] with 1 to `most` digits, in a fixed order."""
    everything = np.array(list(itertools.product(range(EMPTY, 10), repeat=4)))
    count = (everything != EMPTY).sum(1)
    return everything[(count > 0) & (count <= most)]


@functools.cache
def _meanings() -> dict[str, dict[str, int]]:
    return {caption(label): cells(label) for label in labels()}


@functools.cache
def texts() -> tuple[str, ...]:
    """Training text for the tokenizer: that of the digits, and a caption of every arrangement for every digit."""
    arrangements = [set(which) for n in range(1, 5) for which in itertools.combinations(range(4), n)]
    drawn = [
        np.array([(digit + 3 * i) % 10 if i in which else EMPTY for i in range(4)])
        for which in arrangements
        for digit in range(10)
    ]
    return (*digit_texts(), *map(caption, drawn))


class Canvas:
    """`image`, float32 [size, size, 1], its `label` [4] and `caption`.

    size    pixels of a side
    most    digits of a canvas: 1 to so many, all alike
    shift   digits of training rows are moved at random by at most so many pixels

    Row i of an epoch holds digit image i in its first cell, so that every image is seen; the number of digits, the
    cells and the other images are random. "test" has `TEST_ROWS` fixed canvases.
    """

    holds = "values"
    held_out = TEST_ROWS
    draws = 17  # 0 number of digits · 1-4 order of the cells · 5-8 images · 9-16 shifts

    def __init__(self, *, size: int = 16, most: int = 4, shift: int = 1):
        if size < 2 * digits.SIZE or size % 2 or not 1 <= most <= 4:
            raise ValueError(
                f"a canvas of size {size} with up to {most} digits is not possible: "
                f"give an even size of at least {2 * digits.SIZE} and 1 to 4 digits"
            )
        self.size, self.most, self.shift = size, most, shift

    def __len__(self) -> int:
        return self._trained + self.held_out

    @property
    def _trained(self) -> int:
        return len(digits.load("train").labels)

    def __getitem__(self, number: int) -> Example:
        return self._example(number, None)

    def drawn(self, number: int, uniforms: np.ndarray) -> Example:
        """A random canvas."""
        return self._example(number, uniforms[None])

    def every(self, name: str) -> list[str]:
        """All captions."""
        return [caption(label) for label in labels(self.most)]

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer is trained on."""
        return texts()

    def _example(self, number: int, uniforms: np.ndarray | None) -> Example:
        split, row = ("train", number) if number < self._trained else ("test", number - self._trained)
        images, found = self.canvases(split, np.array([row]), uniforms)
        return Example({"image": images[0], "label": found[0], "caption": caption(found[0])}, f"canvas {number}")

    def canvases(self, split: str, index: np.ndarray, uniforms: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Images [B, size, size, 1] and labels [B, 4] of rows of a split; without uniform numbers fixed ones."""
        images = digits.load(split)
        still = uniforms is None
        if still:
            uniforms = _fixed(len(images.labels))[index]
        count = 1 + choose(uniforms[:, 0], self.most)
        order = np.argsort(uniforms[:, 1:5], axis=1)  # cells in random order
        used = np.arange(4) < count[:, None]
        chosen = choose(uniforms[:, 5:9], len(images.labels))
        chosen[:, 0] = index % len(images.labels)
        offsets = shifts(uniforms[:, 9:17], 0 if still else self.shift).reshape(-1, 4, 2)
        label = np.full((len(index), 4), EMPTY)
        np.put_along_axis(label, order, np.where(used, images.labels[chosen], EMPTY), axis=1)
        cell = self._cells(images.values[chosen], used, offsets)
        placed = np.empty_like(cell)
        placed[np.arange(len(index))[:, None], order] = cell
        side = self.size // 2
        canvas = placed.reshape(-1, 2, 2, side, side).transpose(0, 1, 3, 2, 4).reshape(-1, self.size, self.size, 1)
        return canvas, label

    def _cells(self, values: np.ndarray, used: np.ndarray, offsets: np.ndarray) -> np.ndarray:
        """Cells [B, 4, side, side] from digits [B, 4, 8, 8, 1], each centred in its cell and then shifted."""
        side, (rows, count) = self.size // 2, used.shape
        margin = side - digits.SIZE
        around = ((0, 0), (margin // 2, margin - margin // 2), (margin // 2, margin - margin // 2), (0, 0))
        flat = np.pad(values.reshape(-1, *digits.SHAPE), around, constant_values=digits.BACKGROUND)
        moved = shift_images(flat, offsets.reshape(-1, 2), digits.BACKGROUND).reshape(rows, count, side, side)
        return np.where(used[:, :, None, None], moved, np.float32(digits.BACKGROUND))


@functools.cache
def _fixed(rows: int) -> np.ndarray:
    """The uniform numbers of canvases without randomness of their own; RandomState's stream is frozen in numpy."""
    return np.random.RandomState(1).random_sample((rows, Canvas.draws))
