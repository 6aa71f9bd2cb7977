"""Packing: examples of different sizes into rows of one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

OPEN = 64  # rows that are filled at a time: more waste less, take longer, and mix examples from farther apart


@dataclasses.dataclass(frozen=True)
class Packs:
    """Which examples lie in which row: row r holds `order[starts[r] : starts[r + 1]]`, from left to right.

    order    all N examples, each once
    starts   where each row begins there, and the end of the last: T = rows + 1
    padding  share of the rows' tokens that no example fills
    """

    order: Int[np.ndarray, "N"]
    starts: Int[np.ndarray, "T"]
    padding: float

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, row: int) -> Int[np.ndarray, "K"]:
        """The examples of a row."""
        return self.order[self.starts[row] : self.starts[row + 1]]


def pack(sizes: Int[np.ndarray, "N W"], room: Sequence[int], most_open: int = OPEN) -> Packs:
    """Rows of examples, first fit: each goes into the first open row that has room for it in every respect, else into a
    new row, for which the oldest of `most_open` open ones is closed. A function of its arguments alone.

    sizes   what each example takes of each thing that is scarce in a row, tokens first (tokens, images, …)
    room    what a row has of each

    Rows come in the order of their first example, and hold examples in their order. Raises ValueError for an example
    that is larger than a row.
    """
    room = np.asarray(room, np.int64)
    large = np.flatnonzero((sizes > room).any(axis=1))
    if large.size:
        raise ValueError(
            f"example {large[0]} takes {sizes[large[0]].tolist()}, a row has {room.tolist()}: cut it, or leave it out"
        )
    rows: list[list[int]] = []
    left = np.zeros((0, len(room)), np.int64)  # of the open rows
    opened: list[int] = []
    for example, size in enumerate(np.asarray(sizes, np.int64)):
        fits = (left >= size).all(axis=1)
        place = int(fits.argmax()) if fits.any() else len(opened)
        if place == len(opened):
            if place == most_open:
                left, opened, place = left[1:], opened[1:], place - 1
            left = np.concatenate([left, room[None]])
            opened.append(len(rows))
            rows.append([])
        rows[opened[place]].append(example)
        left[place] -= size
    starts = np.cumsum([0, *map(len, rows)])
    order = np.asarray([example for row in rows for example in row], np.int64)
    return Packs(order, starts, 1 - float(sizes[:, 0].sum()) / (len(rows) * int(room[0])) if rows else 0.0)
