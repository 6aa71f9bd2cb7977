"""What a task must offer to be read, and how one row is read, so that a bad one spoils nothing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import threading
from typing import Protocol, runtime_checkable

import jax
import numpy as np

from src.data.pipeline.bad_rows import SOUND, BadRow
from src.interfaces import Field, ImageField


@runtime_checkable
class Source(Protocol):
    """What a task must offer to be read: pure functions of the row index and uniform numbers in [0, 1).

    draws     number of uniform numbers of one row
    rows      number of rows of a split
    read      arrays of one row that are slow to fetch (files), by name; {} when all is in memory; raises BadRow, whose
              `rest` is used in place of the row
    blank     what `read` gives, of the same shapes, for a row that it refused
    build     fields of the rows `index` [B], with `uniforms` [B, draws] in training and None in the ordered pass; gets
              sound rows only, perhaps none (B = 0)
    """

    draws: int

    def rows(self, split: str) -> int: ...

    def read(self, split: str, index: int) -> dict[str, np.ndarray]: ...

    def blank(self) -> dict[str, np.ndarray]: ...

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]: ...


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
    """Row transform: {row: [index, uniforms...]}, whatever the source reads, and what is wrong with it.

    float64 holds an index exactly.
    """

    def __init__(self, source: Source):
        self._source = source
        self.reading: dict[int, None] = {}  # in this process

    def __call__(self, index: int | np.integer, rng: np.random.Generator) -> dict[str, np.ndarray]:
        die_with_parent()
        row = np.empty(1 + self._source.draws)
        row[0] = index
        rng.random(out=row[1:])
        self.reading[int(index)] = None
        extra, flaw = read_row(self._source, "train", int(index))
        self.reading.pop(int(index), None)
        return {"row": row, "flaw": flaw, **extra}


def read_row(source: Source, split: str, index: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Arrays of a row, and its flaw as `BadRow.pack` has it, zeros for a sound row."""
    try:
        return source.read(split, index), SOUND
    except BadRow as flaw:
        return source.blank() if flaw.rest is None else dict(flaw.rest), flaw.pack()


def refused(index: np.ndarray, flaws: np.ndarray) -> list[tuple[int, BadRow]]:
    """The bad ones among the rows `index` [B] with `flaws` [B, FLAW_BYTES]."""
    return [(int(index[i]), BadRow.unpack(flaws[i])) for i in np.flatnonzero(flaws.any(axis=1))]


def build_rows(
    source: Source,
    split: str,
    index: np.ndarray,
    uniforms: np.ndarray | None,
    extra: dict[str, np.ndarray],
    sound: np.ndarray,
) -> dict[str, Field]:
    """Fields of the rows; those that are not `sound` [B] are zeros, so that nothing of them is valid or has loss."""

    def spread(leaf: np.ndarray) -> np.ndarray:
        out = np.zeros((len(sound), *leaf.shape[1:]), leaf.dtype)
        out[sound] = leaf
        return out

    if sound.all():
        fields = source.build(split, index, uniforms, extra)
    else:
        extra = {name: leaf[sound] for name, leaf in extra.items()}
        uniforms = None if uniforms is None else uniforms[sound]
        fields = jax.tree.map(spread, source.build(split, index[sound], uniforms, extra))
    whole = lambda field: isinstance(field, ImageField) and field.valid is None
    return {n: f.replace(valid=sound) if whole(f) else f for n, f in fields.items()}
