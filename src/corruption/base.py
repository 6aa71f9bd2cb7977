"""Default methods of the processes (`interfaces.Process`)."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption.schedules import as_time
from src.interfaces import FieldSpec, LossTerm, PyTree

TIME_SCALE = 1000.0


class ProcessBase:
    """Defaults: the network reads x_t and 1000 t, guidance acts on all outputs, and there is no state."""

    field: FieldSpec
    outputs: int

    @property
    def inputs(self) -> FieldSpec:
        """Spec of the embedder's input."""
        return self.field

    @property
    def guided(self) -> int:
        """Number of outputs that guidance acts on: all."""
        return self.outputs

    def times(self, steps: int) -> Float[Array, " T"]:
        """Equal steps from 1 to 0. Raises ValueError for steps < 1."""
        check_steps(steps)
        return jnp.asarray(np.linspace(1.0, 0.0, steps + 1), jnp.float32)

    def network(self, xt: PyTree, t: ArrayLike) -> tuple[Array, Array]:
        """x_t and 1000 t, the scale that timestep embeddings expect."""
        return xt, TIME_SCALE * as_time(t)

    def clean(self, xt: PyTree) -> Array:
        """x_t itself."""
        return xt

    def state(self) -> PyTree:
        """None."""
        return None

    def bind(self, state: PyTree) -> ProcessBase:
        """The process itself."""
        return self

    def update(self, state: PyTree, term: LossTerm, step: Array) -> PyTree:
        """The state, unchanged."""
        return state


def check_steps(steps: int) -> None:
    """Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"A sampler cannot take {steps} steps; give at least 1.")


def expand(t: ArrayLike, x: Array) -> Float[Array, "..."]:
    """Times of shape [], [B], [B, 1] or [B, N], with axes of 1 appended to broadcast against x, [B, N] or [B, N, P].

    Raises ValueError when an axis of t is neither 1 nor as long as that of x.
    """
    t = as_time(t)
    if t.ndim > x.ndim or any(a not in (1, b) for a, b in zip(t.shape, x.shape, strict=False)):
        raise ValueError(
            f"Times of shape {t.shape} do not fit data of shape {x.shape}: give one time, one per row or one per token."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))
