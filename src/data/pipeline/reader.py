"""What a task must offer to be read, and how rows are read, so that a bad one spoils no other."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from src.data.example import SOUND, BadRow, Row
from src.interfaces import Batch


@runtime_checkable
class Rows(Protocol):
    """What a task must offer to be read: pure functions of a row's index and uniform numbers in [0, 1).

    draws     number of uniform numbers of one row
    rows      number of rows of a split
    read      arrays of one row; `uniforms` [draws] in training, None in the ordered pass. Raises BadRow, whose `rest`
              is used in place of the row
    blank     what `read` gives, of the same shapes, for a row that it refused: nothing in it is a target
    build     the batch of such arrays, stacked; what is done here is not done by workers
    """

    draws: int

    def rows(self, split: str) -> int: ...

    def read(self, split: str, index: int, uniforms: np.ndarray | None) -> Row: ...

    def blank(self) -> Row: ...

    def build(self, rows: Mapping[str, np.ndarray]) -> Batch: ...


@functools.cache
def die_with_parent() -> None:
    """Ends this process, if it is a worker, soon after the one that started it: a killed run cannot end its workers."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Reader:
    """Row transform for Grain: index -> the arrays of the row, its index, and what is wrong with it.

    The uniform numbers come from Grain's generator of the row, which (seed, row) decide.
    """

    def __init__(self, task: Rows):
        self._task = task
        self.reading: dict[int, None] = {}  # in this process

    def __call__(self, index: int | np.integer, rng: np.random.Generator) -> dict[str, Any]:
        die_with_parent()
        uniforms = rng.random(self._task.draws)
        self.reading[int(index)] = None
        row, flaw = read_row(self._task, "train", int(index), uniforms)
        self.reading.pop(int(index), None)
        return {"index": np.asarray(index, np.int64), "flaw": flaw, "row": row}


def read_row(task: Rows, split: str, index: int, uniforms: np.ndarray | None = None) -> tuple[Row, np.ndarray]:
    """Arrays of a row, and its flaw as `BadRow.pack` has it, zeros for a sound row."""
    try:
        return task.read(split, index, uniforms), SOUND
    except BadRow as flaw:
        return task.blank() if flaw.rest is None else dict(flaw.rest), flaw.pack()


def refused(index: np.ndarray, flaws: np.ndarray) -> list[tuple[int, BadRow]]:
    """The bad ones among the rows `index` [B] with `flaws` [B, FLAW_BYTES]."""
    return [(int(index[i]), BadRow.unpack(flaws[i])) for i in np.flatnonzero(flaws.any(axis=1))]


def read_batch(
    task: Rows, split: str, index: Sequence[int] | np.ndarray, uniforms: np.ndarray | None = None
) -> tuple[Batch, list[tuple[int, BadRow]]]:
    """The batch of some rows, and the bad ones among them; `uniforms` [B, draws], None: without random changes."""
    draws = [None] * len(index) if uniforms is None else uniforms
    rows, flaws = zip(*(read_row(task, split, int(i), u) for i, u in zip(index, draws, strict=True)), strict=True)
    return task.build(stack(rows)), refused(np.asarray(index), np.stack(flaws))


def stack(rows: Sequence[Row]) -> Row:
    """The arrays of several rows as one array each."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
