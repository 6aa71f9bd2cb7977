"""The last linear layer of a head."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx

from src.models.layers import initializer


def last_linear(d_in: int, d_out: int, *, init: str | float, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose products are in `dtype` and whose result is f32, never rounded on the way."""
    args = {"use_bias": bias, "kernel_init": initializer(init), "dtype": dtype, "rngs": rngs}
    return nnx.Linear(d_in, d_out, preferred_element_type=jnp.float32, **args)
