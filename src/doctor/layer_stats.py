"""Scalars of every log line: updates and gradients by part of the model, lag of the averaged parameters, padding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from src.common import tree
from src.common.mesh.sharding import replicated
from src.interfaces import Batch, PyTree
from src.models.model import STACKED
from src.train.state import TrainState
from src.train.step import StepMetrics
from src.train.system import System
from src.train.trainer import Trainer

MOST = 8  # up to so many blocks all are logged; of a deeper trunk `SPREAD` blocks and the largest value
SPREAD = 5


class LayerStats:
    """Scalars of the last step before each log line.

    ratio/<part>      |update| / |parameters| of a block (`block_00` …) or another part of the model (`text/head`, …)
    gradient/<part>   |gradient| of the same part, before clipping
    ema_lag           |average - parameters| / |parameters|, of all parameters
    padding/<task>    share of padding in the task's rows
    """

    def __init__(self, trainer: Trainer):
        tell, whole = functools.partial(_tell, trainer.system), replicated(trainer.mesh)
        self._tell = jax.jit(tell, out_shardings=whole, compiler_options=fast_compile(trainer))

    def __call__(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> dict[str, float]:
        """The scalars above."""
        apart = self._tell(state.params, state.ema, batch)
        squares, (apart, padding) = jax.device_get((measured.squares, apart))
        size = sum(float(np.sum(a)) for a in squares["param"].values())
        grads = {part: square**0.5 for part, square in by_part(squares["grad"]).items()}
        found = {"ratio": ratios(squares["update"], squares["param"]), "gradient": grads}
        scalars = {f"{kind}/{part}": value for kind, parts in found.items() for part, value in logged(parts).items()}
        if size:
            scalars["ema_lag"] = float(np.sqrt(apart / size))
        return scalars | {f"padding/{task}": float(share) for task, share in padding.items()}


def ratios(update: Mapping[str, np.ndarray], param: Mapping[str, np.ndarray]) -> dict[str, float]:
    """|update| / |parameters| by part, from sums of squares by path; without parts whose parameters are all zero."""
    updates, params = by_part(update), by_part(param)
    return {part: (updates[part] / size) ** 0.5 for part, size in params.items() if size}


def by_part(squares: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Sums of squares by block, by part of a field (`image/head`), and otherwise by the first name of the path after
    `trunk/`."""
    sums: dict[str, float] = {}
    for path, values in squares.items():
        stacked = path.startswith(STACKED)
        names = [block(i) for i in range(len(values))] if stacked else [_part(path)]
        for name, value in zip(names, np.ravel(values), strict=True):
            sums[name] = sums.get(name, 0.0) + float(value)
    return sums


def _part(path: str) -> str:
    first, *names = path.removeprefix("trunk/").split("/")
    return "/".join(names[:2]) if first == "fields" else first


def logged(values: Mapping[str, float]) -> dict[str, float]:
    """The values to log: of more than `MOST` blocks only `SPREAD`, evenly spaced, and `blocks_largest`."""
    blocks = sorted(name for name in values if name.startswith("block_"))
    if len(blocks) <= MOST:
        return dict(values)
    kept = {blocks[i * (len(blocks) - 1) // (SPREAD - 1)] for i in range(SPREAD)}
    rest = {name: value for name, value in values.items() if name not in blocks or name in kept}
    return rest | {"blocks_largest": max(values[name] for name in blocks)}


def block(number: int) -> str:
    """Name of a block in the log."""
    return f"block_{number:02d}"


def fast_compile(trainer: Trainer) -> dict[str, Any]:
    """Compiler options for programs that run rarely: on CPUs few optimizations, since compiling outlasts running."""
    cpu = trainer.mesh.devices.flat[0].platform == "cpu"
    return {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True} if cpu else {}


def padding_shares(system: System, batch: Mapping[str, Batch]) -> dict[str, Float[Array, ""]]:
    """Share of padding in the rows of each task."""
    specs = {name: plan.layout.spec(batch[name]) for name, plan in system.tasks.items()}
    return {name: jnp.mean(spec.segment == 0, dtype=jnp.float32) for name, spec in specs.items()}


def _tell(system: System, params: PyTree, ema: PyTree, batch: Mapping[str, Batch]) -> tuple[Array, dict[str, Array]]:
    apart = jax.tree.map(lambda a, b: jnp.square(a.astype(jnp.float32) - b.astype(jnp.float32)).sum(), ema, params)
    return sum(tree.flatten(apart).values()), padding_shares(system, batch)
