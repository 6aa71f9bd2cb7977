"""How each kind of segment becomes vectors of the model's width."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.models.layers import initializer, linear, sincos_2d


class TokenEmbedder(nnx.Module):
    """Text ids -> vectors, a table of V rows."""

    def __init__(self, vocab: int, width: int, *, init: str | float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        self.table = nnx.Embed(vocab, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        return self.table(ids)


class PatchEmbedder(nnx.Module):
    """Patch features -> vectors: a linear layer, plus fixed 2-D sin-cos positions of the patch grid."""

    def __init__(
        self,
        features: int,
        grid: tuple[int, int],
        width: int,
        *,
        init: str | float = "xavier_uniform",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.grid, self.width, self.dtype = tuple(grid), width, dtype
        self.linear = linear(features, width, init=init, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, patches: Float[Array, "B N P"]) -> Float[Array, "B N D"]:
        return self.linear(patches) + jnp.asarray(sincos_2d(*self.grid, self.width), self.dtype)


class LabelEmbedder(nnx.Module):
    """Class index -> conditioning vector; the last row stands for "no class" (classifier-free guidance)."""

    def __init__(self, classes: int, width: int, *, init: str | float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        self.table = nnx.Embed(classes + 1, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B"]) -> Float[Array, "B D"]:
        return self.table(ids)
