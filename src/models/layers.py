"""Small parts of a transformer: projections, feed-forward networks, sin-cos positions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import initializers
from jaxtyping import Array, Float

from src.common.mesh.constraints import automatic_axes, platform

Initializer = Callable[..., Array]
TORCH = "torch"


def initializer(spec: str | float) -> Initializer:
    """A kernel initializer: a number or "normal:<number>" is the deviation of a normal law, "torch" what a `Linear` of
    torch begins with, U(-1/√inputs, 1/√inputs), another string the name of one of `flax.nnx.initializers` ("zeros",
    "lecun_normal", "xavier_uniform", …)."""
    if spec == TORCH:
        return initializers.variance_scaling(1 / 3, "fan_in", "uniform")
    if isinstance(spec, str) and spec.startswith("normal:"):
        spec = float(spec.removeprefix("normal:"))
    if isinstance(spec, int | float):
        return initializers.zeros_init() if spec == 0 else initializers.normal(spec)
    factory = getattr(initializers, f"{spec}_init", None) or getattr(initializers, spec, None)
    if factory is None:
        raise ValueError(
            f"initializer {spec!r} is unknown; use 'normal:0.02', 'zeros', 'lecun_normal', 'xavier_uniform', 'torch'"
        )
    return factory()


def linear(d_in: int, d_out: int, *, init: str | float, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """`nnx.Linear` with f32 parameters, computing in `dtype`; the bias starts at zero, with "torch" as the kernel."""
    args = {"kernel_init": initializer(init), "dot_general": product, "dtype": dtype, "rngs": rngs}
    if init == TORCH:
        args["bias_init"] = lambda key, shape, kind=jnp.float32: jax.random.uniform(key, shape, kind, -1, 1) / d_in**0.5
    return nnx.Linear(d_in, d_out, use_bias=bias, **args)


def product(x: Float[Array, "*lead I"], kernel: Float[Array, "I O"], dimensions: Any, **options: Any) -> Array:
    """`jax.lax.dot_general` of the last axis of x with the first of the kernel.

    On CPU the leading axes are made one first: with several, XLA writes the gradient of the result to memory again,
    transposed, for the gradient of the kernel. Elsewhere, and where the compiler partitions x, they stay as they are.
    """
    if x.ndim < 3 or platform() != "cpu" or automatic_axes():
        return jax.lax.dot_general(x, kernel, dimensions, **options)
    rows = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return rows.reshape(*x.shape[:-1], kernel.shape[1])


class LayerNorm(nnx.Module):
    """Normalisation to mean 0 and variance 1 without learned scale or shift (DiT), in f32."""

    def __init__(self, width: int, *, epsilon: float = 1e-6, dtype=jnp.float32, rngs: nnx.Rngs | None = None):
        self.epsilon, self.dtype = epsilon, dtype

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt((centred**2).mean(-1, keepdims=True) + self.epsilon)).astype(self.dtype)


class RMSNorm(nnx.RMSNorm):
    """Llama's normalisation: x / rms(x) · weight, statistics in f32 (Zhang & Sennrich 2019)."""

    def __init__(self, width: int, *, epsilon: float = 1e-5, dtype=jnp.float32, rngs: nnx.Rngs):
        super().__init__(width, epsilon=epsilon, dtype=dtype, rngs=rngs)


class SwiGLU(nnx.Module):
    """down(silu(gate x) · up x) (Shazeer 2020), the feed-forward network of Llama."""

    def __init__(self, width: int, inner: int, *, init, bias: bool, dtype, rngs: nnx.Rngs):
        args = {"init": init, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.gate = linear(width, inner, **args)
        self.up = linear(width, inner, **args)
        self.down = linear(inner, width, **args)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class GELU(nnx.Module):
    """down(gelu(up x)), the feed-forward network of ViT and DiT (tanh approximation)."""

    def __init__(self, width: int, inner: int, *, init, bias: bool, dtype, rngs: nnx.Rngs):
        args = {"init": init, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.up = linear(width, inner, **args)
        self.down = linear(inner, width, **args)

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return self.down(jax.nn.gelu(self.up(x), approximate=True))


def timestep_features(t: Float[Array, "*B"], size: int = 256) -> Float[Array, "*B {size}"]:
    """[cos(t f_k), sin(t f_k)] with f_k = 10000^(-k / (size/2)), in f32 (DiT)."""
    frequency = jnp.exp(-np.log(10_000.0) * jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angles = t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def sincos_2d(height: int, width: int, dim: int) -> np.ndarray:
    """Fixed positions `[height · width, dim]`: first half column, second half row, each [sin, cos]."""
    if dim % 4:
        raise ValueError(f"2-D sin-cos positions need a model width that is a multiple of 4, got {dim}")
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    return np.concatenate([sincos_axis(column.reshape(-1), dim // 2), sincos_axis(row.reshape(-1), dim // 2)], axis=1)


def sincos_axis(index: np.ndarray, size: int) -> np.ndarray:
    """[sin(i f_k), cos(i f_k)] with f_k = 10000^(-k / (size/2)), `[*indices, size]`."""
    angles = index[..., None] * 10_000.0 ** (-np.arange(size // 2) / (size // 2))
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).astype(np.float32)
