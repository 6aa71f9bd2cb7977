"""What most processes answer alike (`interfaces.Process`). A process overrides what it does otherwise."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from src.interfaces import FieldSpec, LossTerm, PyTree


class Base:
    """The network reads x_t as it is, guidance acts on all outputs, and there is no state."""

    field: FieldSpec
    outputs: int

    @property
    def inputs(self) -> FieldSpec:
        """Of what the embedder reads."""
        return self.field

    @property
    def guided(self) -> int:
        """All outputs."""
        return self.outputs

    def times(self, steps: int) -> Float[Array, " T"]:
        """Equal steps from 1 to 0. Raises ValueError for steps < 1."""
        check_steps(steps)
        return jnp.asarray(np.linspace(1.0, 0.0, steps + 1), jnp.float32)

    def network(self, xt: PyTree, t: Array) -> tuple[Array, Array]:
        """x_t and t as they are."""
        return xt, t

    def clean(self, xt: PyTree) -> Array:
        """x_t itself."""
        return xt

    def state(self) -> PyTree:
        """None."""
        return None

    def bind(self, state: PyTree) -> Base:
        """The process itself."""
        return self

    def update(self, state: PyTree, term: LossTerm, step: Array) -> PyTree:
        """The state as it was."""
        return state


def check_steps(steps: int) -> None:
    """Raises ValueError for steps < 1."""
    if steps < 1:
        raise ValueError(f"A sampler cannot take {steps} steps; give at least 1.")
