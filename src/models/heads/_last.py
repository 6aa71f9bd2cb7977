"""What heads of one linear layer share."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.interfaces import FieldSpec, Guide
from src.models.layers import initializer


def last_linear(d_in: int, d_out: int, *, init: str | float, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose products are in `dtype` and whose result is f32, never rounded on the way."""
    args = {"use_bias": bias, "kernel_init": initializer(init), "dtype": dtype, "rngs": rngs}
    return nnx.Linear(d_in, d_out, preferred_element_type=jnp.float32, **args)


class OneLayer(nnx.Module):
    """A head that is one linear layer, without its loss. Subclasses set `linear`, and `spec`, that of the tokens."""

    linear: nnx.Linear
    spec: FieldSpec

    def __call__(self, hidden: Float[Array, "*B D"], cond: Array | None = None) -> Float[Array, "*B outputs"]:
        """The outputs, f32; `cond` is not used."""
        return self.linear(hidden)

    def noise(self, key: Array, shape: tuple[int, int]) -> tuple[()]:
        """Nothing: the loss is not random."""
        return ()

    def sample(
        self, key: Array, hidden: Float[Array, "B D"], guide: Guide, choose: Callable[[Array, Array], Array]
    ) -> Array:
        """The next id, or the mean vector, of each row that `guide` leaves; the time of what is not known is 1."""
        output = guide(self(hidden), jnp.float32(1))
        return choose(key, output) if self.spec.features is None else output
