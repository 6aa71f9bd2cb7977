"""How the diffusion time (and conditions of the row) enter the transformer: one class per published way, by name.

Every class may act in three places, and leaves the others alone:
  tokens   number of time tokens in front of a segment whose field has them (`time_token`), made by `token(vector)`
  before   changes the tokens of fields with a process once, before the first block; unless `clean`, the noised alone
  Layer    a module in every block that turns the vector into a `Modulation`
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from src.models.layers import linear, timestep_features


class Condition(NamedTuple):
    """Conditioning vectors `[B, T, D]` and, for every token, which of them it belongs to (-1: none).

    `own`: whether the token has parts of the trunk of its own (`models/mixture_of_transformers.py`); None: none has.
    """

    vector: Float[Array, "B T D"]
    owner: Int[Array | np.ndarray, "*B S"]
    own: Bool[Array | np.ndarray, "*B S"] | None = None


class Modulation(NamedTuple):
    """The effect of the condition of each token on a block, `[B, S, D]` each; None: no effect."""

    add: Array | None = None
    shift_attention: Array | None = None
    scale_attention: Array | None = None
    gate_attention: Array | None = None
    shift_mlp: Array | None = None
    scale_mlp: Array | None = None
    gate_mlp: Array | None = None


def modulate(x: Float[Array, "B S D"], shift: Array | None, scale: Array | None) -> Float[Array, "B S D"]:
    """x · (1 + scale) + shift."""
    return x if shift is None else x * (1 + scale) + shift


def per_token(
    values: Float[Array, "B T D"], owner: Int[Array | np.ndarray, "*B S"], other: float = 0.0
) -> Float[Array, "B S D"]:
    """Hands each token the row of its owner; tokens without owner get `other`."""
    owner = jnp.broadcast_to(owner, (values.shape[0], owner.shape[-1]))
    if values.shape[1] > 1:
        values = jnp.take_along_axis(values, jnp.maximum(owner, 0)[..., None], axis=1)
    return jnp.where((owner >= 0)[..., None], values, jnp.asarray(other, values.dtype))


class TimestepEmbedder(nnx.Module):
    """Sinusoidal features, linear, SiLU, linear (DiT)."""

    def __init__(
        self, width: int, *, features: int = 256, init: str | float = 0.02, bias: bool = True, dtype, rngs: nnx.Rngs
    ):
        self.features = features
        self.first = linear(features, width, init=init, bias=bias, dtype=dtype, rngs=rngs)
        self.second = linear(width, width, init=init, bias=bias, dtype=dtype, rngs=rngs)

    def __call__(self, t: Float[Array, "B T"]) -> Float[Array, "B T D"]:
        return self.second(jax.nn.silu(self.first(timestep_features(t, self.features))))


class Conditioning(nnx.Module):
    """No conditioning of the trunk; the head still gets the time. The base of the others."""

    tokens = 0
    clean = True
    Layer: type | None = None

    def __init__(self, width: int, *, dtype=jnp.float32, rngs: nnx.Rngs):
        self.width = width

    def token(self, vector: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        raise ValueError(f"{type(self).__name__} has no time token")

    def before(self, x: Float[Array, "B N D"], vector: Float[Array, "B T D"]) -> Float[Array, "B N D"]:
        return x


class TimeToken(Conditioning):
    """One extra token before the segment: linear, GELU, linear of the time vector (MonoFormer's released configs).

    init: `fixed` starts both linears at random (LeCun), so every tensor is trained and the token depends on time from
    the start; `official` starts both at zero, as published: then only the last bias ever gets a gradient.
    """

    tokens = 1

    def __init__(self, width: int, *, init: str = "fixed", dtype=jnp.float32, rngs: nnx.Rngs):
        if init not in ("fixed", "official"):
            raise ValueError(f"TimeToken: init {init!r} is unknown; use 'fixed' or 'official'")
        kernel = "lecun_normal" if init == "fixed" else "zeros"
        self.first = linear(width, width, init=kernel, bias=True, dtype=dtype, rngs=rngs)
        self.second = linear(width, width, init=kernel, bias=True, dtype=dtype, rngs=rngs)

    def token(self, vector: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.second(jax.nn.gelu(self.first(vector), approximate=False))


class AdaLNBeforeTrunk(Conditioning):
    """Noised tokens · (1 + scale) + shift once, before the trunk (the MonoFormer paper's description)."""

    def __init__(self, width: int, *, init: str | float = 0.0, dtype=jnp.float32, rngs: nnx.Rngs):
        self.linear = linear(width, 2 * width, init=init, bias=True, dtype=dtype, rngs=rngs)

    def before(self, x: Float[Array, "B N D"], vector: Float[Array, "B T D"]) -> Float[Array, "B N D"]:
        shift, scale = jnp.split(self.linear(jax.nn.silu(vector)), 2, axis=-1)
        return x * (1 + scale) + shift


class AddBeforeTrunk(Conditioning):
    """Noised tokens + vector once, before the trunk; clean tokens stay as they are (CausalFusion)."""

    clean = False

    def before(self, x: Float[Array, "B N D"], vector: Float[Array, "B T D"]) -> Float[Array, "B N D"]:
        return x + vector


class AddLayer(nnx.Module):
    """One block's additive time: linear(SiLU(vector))."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.linear = linear(width, width, init=0.0, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Condition) -> Modulation:
        return Modulation(add=per_token(self.linear(jax.nn.silu(condition.vector)), condition.owner))


class AdditivePerLayer(Conditioning):
    """Adds the time to the noised tokens at the entry of every block (MonoFormer's `add_at_each_layer`)."""

    Layer = AddLayer


class AdaLNLayer(nnx.Module):
    """One block's adaLN-zero: shift, scale and gate for attention and for the feed-forward network (DiT)."""

    def __init__(self, width: int, *, dtype, rngs: nnx.Rngs):
        self.linear = linear(width, 6 * width, init=0.0, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, condition: Condition) -> Modulation:
        parts = jnp.split(self.linear(jax.nn.silu(condition.vector)), 6, axis=-1)
        neutral = (0.0, 0.0, 1.0, 0.0, 0.0, 1.0)  # a token without time passes through an ordinary block
        return Modulation(None, *(per_token(p, condition.owner, n) for p, n in zip(parts, neutral, strict=True)))


class AdaLNPerLayer(Conditioning):
    """adaLN-zero in every block (DiT, Peebles & Xie 2023); other tokens pass through unmodulated."""

    Layer = AdaLNLayer
