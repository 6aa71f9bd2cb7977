"""The loop of reverse steps of one field, for a denoiser that is a function of (x_t, t)."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Process, PyTree, StepSampler

Denoise = Callable[[PyTree, Array], PyTree]  # (x_t, scalar t) -> the process's estimate


def integrate(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, times: Array) -> PyTree:
    """x at the last of the decreasing `times` [T + 1], from x at the first, as one scan; step i gets the key folded
    with i. Floats are carried in float32 or wider."""

    def body(carry: tuple[PyTree, PyTree], now: tuple[Array, Array, Array]) -> tuple[tuple[PyTree, PyTree], None]:
        (x, state), (i, t, s) = carry, now
        return sampler.step(process, jax.random.fold_in(key, i), denoise(x, t), x, t, s, state, denoise), None

    xt = jax.tree.map(_wide, xt)
    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    return jax.lax.scan(body, (xt, sampler.init(process, xt)), steps)[0][0]


def sample(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, steps: int) -> PyTree:
    """x at t = 0 from noise x_t in `steps` steps on the sampler's own time grid."""
    return integrate(sampler, process, denoise, key, xt, sampler.times(process, steps))


def _wide(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x
