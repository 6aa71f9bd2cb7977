"""A learned codec whose tokens are codes (VQ-VAE), trained with the network that reads and makes its ids.

1. An encoder maps each vector linearly to a vector z of `numbers` numbers, and adds what a layer over all vectors of
   the value says; a decoder maps codes back in the same way. The layers over all begin at zero, so that the tokens of
   one value learn to help each other, which those of k-means cannot.
2. ids = argmin_k |z - c_k|². Training decodes z + sg(c - z) (straight-through, sg: no gradient); the losses are
   the error of the vectors, |sg(z) - c|² (codebook) and commit · |z - sg(c)|² (commitment).
3. Dead codes: each code that no z of the batch is nearest to is drawn to its own nearest z, with weight `revive`.

Sources: van den Oord et al. 2017 "VQ-VAE" (2); Zheng & Vedaldi 2023 "CVQ-VAE" (3, here as a loss).
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec


class _Together(nnx.Module):
    """Two layers over all tokens of a value, the second one zero at first; nothing with a hidden width of 0."""

    def __init__(self, d_in: int, hidden: int, d_out: int, dtype: Any, rngs: nnx.Rngs):
        zeros = nnx.initializers.zeros_init()
        self.first = nnx.Linear(d_in, hidden, dtype=dtype, rngs=rngs) if hidden else None
        self.second = nnx.Linear(hidden, d_out, dtype=dtype, kernel_init=zeros, rngs=rngs) if hidden else None

    def __call__(self, x: Float[Array, "B N I"]) -> Float[Array, "B N O"] | float:
        if self.first is None:
            return 0.0
        out = self.second(nnx.gelu(self.first(x.reshape(x.shape[0], -1))))
        return out.reshape(*x.shape[:2], -1)


class VectorQuantizer(nnx.Module):
    """Vectors [B, N, P] <-> ids [B, N] of `codes` codes.

    numbers   of a code
    hidden    width of the layers over all vectors; 0: none, each token for itself
    commit    weight of the commitment loss, `revive` that of dead codes

    Raises ValueError for less than 2 codes, and tokens that are no vectors of a fixed grid.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        codes: int = 64,
        numbers: int = 8,
        hidden: int = 256,
        commit: float = 0.25,
        revive: float = 0.1,
        dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if codes < 2 or spec.features is None or spec.vocab is not None or not spec.grid:
            raise ValueError(f"codes={codes} must be at least 2, and the tokens vectors of a fixed grid, not {spec}")
        self.spec, self.numbers, self.commit, self.revive = spec, numbers, commit, revive
        self.tokens = math.prod(spec.grid)
        linear = lambda a, b: nnx.Linear(a, b, dtype=dtype, rngs=rngs)
        self.encoder, self.decoder = linear(spec.features, numbers), linear(numbers, spec.features)
        self.encoder_all = _Together(self.tokens * spec.features, hidden, self.tokens * numbers, dtype, rngs)
        self.decoder_all = _Together(self.tokens * numbers, hidden, self.tokens * spec.features, dtype, rngs)
        self.table = nnx.Param(jax.random.normal(rngs.params(), (codes, numbers)) * 0.5)

    def latents(self, value: Float[Array, "B N P"]) -> Float[Array, "B N D"]:
        """z of vectors, f32."""
        return (self.encoder(value) + self.encoder_all(value)).astype(jnp.float32)

    def values(self, codes: Float[Array, "B N D"]) -> Float[Array, "B N P"]:
        """Vectors of codes, f32."""
        return (self.decoder(codes) + self.decoder_all(codes)).astype(jnp.float32)

    def distances(self, z: Float[Array, "B N D"]) -> Float[Array, "B N K"]:
        """|z - c_k|² for every code, f32."""
        table = self.table[...]
        products = jnp.einsum("bnd,kd->bnk", z, table, precision=jax.lax.Precision.HIGHEST)
        return (z**2).sum(-1, keepdims=True) - 2 * products + (table**2).sum(-1)

    def encode(self, value: Float[Array, "*B N P"]) -> Int[Array, "*B N"]:
        """Ids of vectors; no gradient goes through them."""
        flat = value.reshape(-1, *value.shape[-2:])
        return jnp.argmin(self.distances(self.latents(flat)), axis=-1).astype(jnp.int32).reshape(value.shape[:-1])

    def decode(self, ids: Int[Array, "*B N"]) -> Float[Array, "*B N P"]:
        """Vectors of ids."""
        made = self.values(self.table[...][ids.reshape(-1, ids.shape[-1])])
        return made.reshape(*ids.shape, self.spec.features)

    def losses(self, value: Float[Array, "B N P"]) -> dict[str, Float[Array, "B N"]]:
        """By name, each token's: `reconstruction`, `codebook`, `commitment`, and `dead`, which is the same for all."""
        z = self.latents(value)
        distance = jax.lax.stop_gradient(self.distances(z))
        ids = jnp.argmin(distance, axis=-1)
        codes, still = self.table[...][ids], jax.lax.stop_gradient
        made = self.values(z + still(codes - z))
        flat, used = z.reshape(-1, self.numbers), jnp.zeros(distance.shape[-1]).at[ids.reshape(-1)].add(1.0)
        nearest = still(flat)[jnp.argmin(distance.reshape(-1, distance.shape[-1]), axis=0)]
        dead = jnp.where(used > 0, 0.0, ((self.table[...] - nearest) ** 2).mean(-1)).mean()
        return {
            "reconstruction": ((made - value) ** 2).mean(-1),
            "codebook": ((codes - still(z)) ** 2).mean(-1),
            "commitment": self.commit * ((still(codes) - z) ** 2).mean(-1),
            "dead": jnp.broadcast_to(self.revive * dead, ids.shape),
        }
