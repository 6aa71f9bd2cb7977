"""What the checks look at."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from src.doctor.diagnostic import Finding
from src.interfaces import Batch, SequenceSpec, TokenField
from src.sequence.layout import Layout
from src.sequence.packed import Document, placed
from src.train.step import StepMetrics
from src.train.system import System
from src.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Case:
    """A run before its first step.

    shapes   the batch's arrays as shapes and dtypes, rows of all processes
    batch    the rows of this process, in numpy
    steps    what the trial steps measured, in numpy; empty before them
    """

    trainer: Trainer
    shapes: Mapping[str, Batch]
    batch: Mapping[str, Batch]
    steps: tuple[StepMetrics, ...] = ()

    @property
    def system(self) -> System:
        return self.trainer.system


Check = Callable[[Case], list[Finding]]


def open_case(trainer: Trainer, batch: Mapping[str, Batch]) -> Case:
    """The case of a batch that lies on the devices."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dict(batch))
    return Case(trainer, shapes, jax.tree.map(local_rows, dict(batch)))


def local_rows(array: Any) -> np.ndarray:
    """The rows of an array `[B, …]` that lie on this process's devices, each once."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def row_valid(layout: Layout, batch: Batch) -> np.ndarray:
    """Which places of the rows are no padding, `[B, S]` bool; segments without flags are all valid."""
    if isinstance(layout, Document):
        return np.asarray(placed(layout, batch)[1])
    rows = len(jax.tree.leaves(dict(batch))[0])
    kinds = {s.name: s.kind for s in layout.segments}
    flags = {name: field.valid for name, field in batch.items() if isinstance(field, TokenField)}
    for name, field in batch.items():  # an image to understand that is not there is padding
        if kinds.get(name) == "vision" and field.valid is not None:
            flags[name] = np.broadcast_to(np.asarray(field.valid)[:, None], (rows, layout.segment(name).length))
    parts = [flags.get(s.name, np.ones((rows, s.length), bool)) for s in layout.segments]
    return np.concatenate(parts, axis=1)


def foretold(layout: Layout, batch: Batch, name: str) -> np.ndarray:
    """Which tokens of a text segment have a place before them that predicts them, `[B, N]` bool."""
    seen = row_valid(layout, batch)
    if isinstance(layout, Document):
        nothing = jnp.zeros((*seen.shape, 1))
        return np.asarray(layout.before(nothing, jnp.asarray(seen), placed(layout, batch)[0])[1])
    where = layout.slices()[name]
    return np.pad(seen, [(0, 0), (1, 0)])[:, where]


def row_specs(layout: Layout, batch: Batch, most: int) -> Iterator[tuple[np.ndarray, SequenceSpec]]:
    """Rows of different patterns, at most so many: which places are no padding, `[S]`, and who sees whom, numpy."""
    valid = row_valid(layout, batch)
    if isinstance(layout, Document):
        specs = jax.device_get(layout.spec_of(jnp.asarray(valid), placed(layout, batch)[0]))
        for row in range(min(len(valid), most)):
            pick = lambda a, row=row: a[row] if a.ndim > 1 else a
            yield valid[row], jax.tree.map(pick, specs)
        return
    read, write, group = layout.static_orders()
    for row in np.unique(valid, axis=0)[:most]:
        yield row, SequenceSpec(read, write, group, row.astype(np.int32), np.zeros((len(row), 1), np.int32))
