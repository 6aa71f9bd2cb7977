"""Grouped-query self-attention with rotary positions and an optional key-value cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from src.common.activations import constrain
from src.models.layers import RMSNorm, linear, rotate

KeyValue = tuple[Array, Array]  # k, v: [B, S, K, h]


class Attention(nnx.Module):
    """softmax(q kᵀ / √h) v with H query heads and K key-value heads (GQA, Ainslie et al. 2023).

    qk_norm: RMSNorm on q and k of each head before the rotation (Dehghani et al. 2023).
    rope:    rotary positions; off for networks with absolute positions only (DiT).
    """

    def __init__(
        self, width: int, heads: int, kv_heads: int, *, qk_norm: bool, rope: bool, init, bias: bool, dtype, rngs
    ):
        self.heads, self.kv_heads, self.head_dim, self.rope = heads, kv_heads, width // heads, rope
        args = {"init": init, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.q = linear(width, heads * self.head_dim, **args)
        self.k = linear(width, kv_heads * self.head_dim, **args)
        self.v = linear(width, kv_heads * self.head_dim, **args)
        self.out = linear(heads * self.head_dim, width, **args)
        self.q_norm = RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, dtype=dtype, rngs=rngs) if qk_norm else None

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        mask: Bool[Array, "B Q K"],
        angles: Float[Array, "*B Q half"],
        cache: KeyValue | None = None,
        start: int | Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B Q D"], KeyValue | None]:
        """Attends from x to itself, or to the cache into which x is written at slot `start`."""
        rows, length, _ = x.shape
        q = self.q(x).reshape(rows, length, self.heads, self.head_dim)
        k = self.k(x).reshape(rows, length, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(rows, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rope:
            q, k = rotate(q, angles), rotate(k, angles)
        if cache is not None:
            write = jax.vmap(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0))
            k, v = write(cache[0], k.astype(cache[0].dtype)), write(cache[1], v.astype(cache[1].dtype))
            cache = (k, v)
        q = constrain(q, "rows", "places", "features", None)
        k, v = (constrain(a, "rows", None, "features", None) for a in (k, v))  # every place reads all of them
        out = attend(q, k, v, mask)
        return self.out(out.reshape(rows, length, -1)), cache


def attend(
    q: Float[Array, "B Q H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"], mask: Bool[Array, "B Q S"]
) -> Float[Array, "B Q H h"]:
    """Dense attention by XLA, softmax in f32. A query that sees nothing (padding) gets the mean of v, never NaN."""
    return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=jnp.expand_dims(mask, 1))
