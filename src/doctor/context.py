"""The input of the checks."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.doctor.diagnostic import Diagnostic
from src.doctor.layer_stats import fast_compile
from src.interfaces import Batch, Layout, SequenceSpec
from src.train.step import StepMetrics
from src.train.system import System, TaskPlan
from src.train.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class CheckContext:
    """A run before its first step.

    shapes   shapes and dtypes of the batch, rows of all processes
    batch    numpy arrays, rows of this process
    steps    numpy metrics of the trial steps; empty before them
    """

    trainer: Trainer
    shapes: Mapping[str, Batch]
    batch: Mapping[str, Batch]
    steps: tuple[StepMetrics, ...] = ()

    @property
    def system(self) -> System:
        return self.trainer.system

    def spec(self, task: str) -> SequenceSpec:
        """The spec of a task's rows, in numpy."""
        return self._described[task][0]

    def valid(self, task: str) -> np.ndarray:
        """Positions of a task's rows that are not padding, `[B, S]` bool."""
        return self.spec(task).segment > 0

    def has_predictor(self, task: str, name: str) -> np.ndarray:
        """Tokens of a name with a token before them that predicts them, `[B, N]` bool; of names that an objective
        predicts so."""
        return self._described[task][1][name]

    @functools.cached_property
    def _described(self) -> dict[str, tuple[SequenceSpec, dict[str, np.ndarray]]]:
        plans = self.system.tasks
        describe = lambda batch: {task: _describe(plan, batch[task]) for task, plan in plans.items()}
        # One program of all tasks: each operation by itself would be compiled at every start.
        return jax.device_get(jax.jit(describe, compiler_options=fast_compile(self.trainer))(dict(self.batch)))


Check = Callable[[CheckContext], list[Diagnostic]]


def check_context(trainer: Trainer, batch: Mapping[str, Batch]) -> CheckContext:
    """`CheckContext` of a batch on the devices."""
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), dict(batch))
    return CheckContext(trainer, shapes, jax.tree.map(local_rows, dict(batch)))


def local_rows(array: Any) -> np.ndarray:
    """The rows of an array `[B, …]` that lie on this process's devices, each once."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable:
        return np.asarray(array)
    shards = {shard.index[0].start or 0: shard for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start].data) for start in sorted(shards)])


def _describe(plan: TaskPlan, batch: Batch) -> tuple[SequenceSpec, dict[str, Array]]:
    """The spec of a task's rows, and the tokens `[B, N]` with a token before them, by name of those predicted so."""
    spec = plan.layout.spec(batch)
    nothing = jnp.zeros((*spec.segment.shape, 1))
    objectives = [objective for objective, _ in plan.objectives.values()]
    names = {n for each in objectives if getattr(each, "predicts_next", False) for n in each.names}
    return spec, {name: plan.layout.before(batch, nothing, name)[1] for name in sorted(names)}


def row_specs(spec: SequenceSpec, most: int) -> Iterator[tuple[int, np.ndarray, SequenceSpec]]:
    """At most `most` rows with different specs, in numpy: (row, positions that are not padding `[S]`, spec)."""
    alike = all(np.ndim(a) == 1 for a in (spec.read, spec.write, spec.group)) and spec.relation is None
    rows = np.unique(spec.segment, axis=0, return_index=True)[1] if alike else np.arange(len(spec.segment))
    for row in rows[:most]:
        pick = lambda a, row=row: a if np.ndim(a) == 1 else a[row]
        yield int(row), spec.segment[row] > 0, jax.tree.map(pick, spec)


def segment_numbers(layout: Layout, batch: Batch) -> np.ndarray:
    """Number of each position's segment in the layout, from 1; 0 outside of segments, `[B, S]`."""
    numbers = {}
    for number, segment in enumerate(layout.segments, 1):
        shape = np.shape(batch.tokens[segment.name].valid)
        lead = (*shape[:-1], segment.lead)
        numbers |= {(segment.name, copy): np.full(shape, number) for copy in ("clean", "noisy")}
        numbers |= {(segment.name, "lead"): np.full(lead, number)} if segment.lead else {}
    return np.asarray(layout.join(batch, numbers))
