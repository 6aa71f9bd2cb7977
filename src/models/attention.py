"""Grouped-query self-attention with rotary positions and an optional key-value cache, and the choice of its backend."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float, Int

from src.common.lookup import lookup
from src.common.mesh.constraints import constrain
from src.interfaces import SequenceSpec
from src.models.layers import RMSNorm, linear
from src.models.mixture_of_transformers import Kinds, part
from src.models.rotary import rotate

# Keys and values of all layers, `[L, B, K, S, h]`, and the layer: written in place, and read without transposing.
Stored = tuple[Array, Array, Array]
Attend = Callable[[Array, Array, Array], Array]  # q [B, Q, H, h], k and v [B, S, K, h] -> [B, Q, H, h]

BACKENDS = "models/backends"
KERNELS = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}  # what `auto` tries on a platform; elsewhere dense
SHORTEST = 128  # of the rows that `auto` gives to a kernel: its smallest tile would be mostly padding below


class Sizes(NamedTuple):
    """Properties of the arrays that choose and prepare a backend."""

    rows: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: Any
    platform: str


class Attention(nnx.Module):
    """softmax(q kᵀ / √h) v with H query heads and K key-value heads (GQA, Ainslie et al. 2023).

    head_dim: h; with width D it need not be D / H (Qwen 3)
    qk_norm: RMSNorm on q and k of each head before the rotation (Dehghani et al. 2023), with this epsilon; None: none
    rope:    rotary positions; off for networks with absolute positions only (DiT); `magnitude` is theirs
    bias:    of all four projections; qkv_bias: of q, k and v (Qwen 2)
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        *,
        qk_norm: float | None,
        rope: bool,
        magnitude: float = 1.0,
        init: str | float,
        bias: bool,
        qkv_bias: bool = False,
        dtype,
        rngs: nnx.Rngs,
    ):
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.rope, self.magnitude = rope, magnitude
        args = {"init": init, "bias": bias or qkv_bias, "dtype": dtype, "rngs": rngs}
        self.q = linear(width, heads * head_dim, **args)
        self.k = linear(width, kv_heads * head_dim, **args)
        self.v = linear(width, kv_heads * head_dim, **args)
        self.out = linear(heads * head_dim, width, **args | {"bias": bias})
        normed = qk_norm is not None
        self.q_norm = RMSNorm(head_dim, epsilon=qk_norm, dtype=dtype, rngs=rngs) if normed else None
        self.k_norm = RMSNorm(head_dim, epsilon=qk_norm, dtype=dtype, rngs=rngs) if normed else None

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        attend: Attend,
        angles: Float[Array, "*B Q half"],
        cache: Stored | None = None,
        start: int | Int[Array, ""] | None = None,
        own: Attention | None = None,
        kinds: Kinds = None,
    ) -> tuple[Float[Array, "B Q D"], Stored | None]:
        """Attends from x to itself, or to the cache into which x is written at slot `start`.

        Tokens of these `kinds` take the projections and norms of `own`, if it is there; the attention is one.
        """
        rows, length, _ = x.shape
        of = functools.partial(part, self, own, kinds=kinds)
        q = of("q")(x).reshape(rows, length, self.heads, self.head_dim)
        k = of("k")(x).reshape(rows, length, self.kv_heads, self.head_dim)
        v = of("v")(x).reshape(rows, length, self.kv_heads, self.head_dim)
        if self.q_norm is not None:
            q, k = of("q_norm")(q), of("k_norm")(k)
        if self.rope:
            q, k = (rotate(a, angles, self.magnitude) for a in (q, k))
        if cache is not None:
            keys, values, layer = cache
            keys, values = _write(keys, k, layer, start), _write(values, v, layer, start)
            k, v = (jax.lax.dynamic_index_in_dim(a, layer, keepdims=False).swapaxes(1, 2) for a in (keys, values))
            cache = (keys, values, layer)
        q = constrain(q, "rows", "places", "features", None)
        k, v = (constrain(a, "rows", None, "features", None) for a in (k, v))  # every place reads all of them
        out = attend(q, k, v)
        return of("out")(out.reshape(rows, length, -1)), cache


def _write(stored: Array, new: Float[Array, "B Q K h"], layer: Array, start: int | Array) -> Array:
    place = (layer, 0, 0, start, 0)
    return jax.lax.dynamic_update_slice(stored, new.swapaxes(1, 2)[None].astype(stored.dtype), place)


def prepare_attention(name: str, query: SequenceSpec, key: SequenceSpec, sizes: Sizes, cached: bool = False) -> Attend:
    """The function that attends as `query` and `key` allow; made once, used by every layer.

    name    a file of `models/backends`, or `auto`: the kernel of the platform if it takes these sizes, else dense.
    cached  the keys come from a cache; that is dense whatever the name, since a few queries fill no kernel

    Raises ValueError when a backend that was named cannot take the sizes, or does not exist.
    """
    backend, dense = find_backend(name, sizes.platform), find_backend("dense")
    reason = backend.refusal(sizes)
    if name == "auto" and (reason or sizes.keys < SHORTEST):
        backend = dense
    elif reason and not cached:
        raise ValueError(f"model.trunk.attention={name!r} {reason}; use auto or dense")
    return (dense if cached else backend)(query, key, sizes)


def find_backend(name: str, platform: str = "") -> type:
    """The backend class of that name, or what `auto` prefers on a platform. Raises ValueError when there is none."""
    try:
        return lookup(BACKENDS, KERNELS.get(platform, "dense") if name == "auto" else name)
    except ValueError as error:
        raise ValueError(f"model.trunk.attention={name!r} is neither auto nor a backend: {error}") from error
