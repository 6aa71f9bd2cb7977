"""Packing: examples of different sizes into rows of one size."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

OPEN = 64  # rows filled at a time: with more, there is less padding, but packing is slower and mixes distant examples


@dataclasses.dataclass(frozen=True)
class Packs:
    """The examples of each row: row r holds `order[starts[r] : starts[r + 1]]`, from left to right.

    order    all N examples, each once
    starts   first index of each row in `order`, and N: T = rows + 1
    padding  share of padding in all rows
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
    """Packs examples by first fit: each goes into the first open row with room for all W sizes, else into a new row;
    then the oldest of more than `most_open` open rows is closed. Deterministic.

    sizes   of each example: tokens first, then other limited things (images, …)
    room    of a row, for each size

    Rows are ordered by their first example, and keep the order of examples. Raises ValueError for an example that is
    larger than a row.
    """
    room = np.asarray(room, np.int64)
    large = np.flatnonzero((sizes > room).any(axis=1))
    if large.size:
        raise ValueError(
            f"example {large[0]} takes {sizes[large[0]].tolist()}, a row has {room.tolist()}: cut or remove it"
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
