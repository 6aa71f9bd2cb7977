"""The train state: a plain tree of arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array, Int, UInt32

from src.common.rng import stream
from src.interfaces import PyTree
from src.models.model import STATES, TEACHER
from src.train import skip_nonfinite
from src.train.average import AVERAGES


@struct.dataclass
class TrainState:
    """The arrays of a checkpoint.

    extra   `seed` of the run (an input of the compiled step, so that all seeds share a program), memory of the `guard`,
            and if there are any the `teacher`'s parameters (`train/teacher.py`), the `states` of adaptive processes by
            field, and further `averages` by name (`train/average.py`)
    """

    step: Int[Array, ""]
    params: PyTree
    ema: PyTree
    opt_state: PyTree
    extra: dict[str, Any]


TeacherSelector = Callable[[PyTree], PyTree]  # parameters -> those of the teacher


def init_state(
    init: Any,
    optimizer: optax.GradientTransformation,
    seed: int | UInt32[Array, ""],
    keep: TeacherSelector | None = None,
    states: PyTree = None,
    averages: Iterable[str] = (),
) -> TrainState:
    """A fresh state; run it under `jax.jit` with output shardings, so that no device holds whole arrays.

    seed   below 2^32, may be traced
    """
    return first_state(init_params(init, seed), optimizer, seed, keep, states, averages)


def init_params(init: Any, seed: int | UInt32[Array, ""]) -> PyTree:
    """The parameters of a fresh state."""
    return init(stream(jax.random.key(jnp.asarray(seed, jnp.uint32)), "init"))


def first_state(
    params: PyTree,
    optimizer: optax.GradientTransformation,
    seed: int | UInt32[Array, ""],
    keep: TeacherSelector | None = None,
    states: PyTree = None,
    averages: Iterable[str] = (),
) -> TrainState:
    """The state of these parameters before the first step.

    keep       selects the teacher's parameters
    states     of adaptive processes, by field
    averages   names of further averages
    """
    extra = {"seed": jnp.asarray(seed, jnp.uint32), "guard": skip_nonfinite.new_guard()}
    extra |= {STATES: states} if states else {}
    copies = {name: jax.tree.map(jnp.copy, params) for name in averages}
    extra |= {AVERAGES: copies} if copies else {}
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema=jax.tree.map(jnp.copy, params),
        opt_state=optimizer.init(params),
        extra=extra | ({TEACHER: keep(params)} if keep else {}),
    )


def with_extras(state: TrainState, params: PyTree | None = None) -> PyTree:
    """The argument of `bind`: parameters (by default the state's), and the teacher and process states of a state, if
    any."""
    params = state.params if params is None else params
    return params | {name: state.extra[name] for name in (TEACHER, STATES) if name in state.extra}
