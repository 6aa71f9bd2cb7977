"""Vectors of a grid -> vectors of the model's width."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.embedders._places import grid_positions
from src.models.layers import linear


class PatchEmbedder(nnx.Module):
    """A linear layer of P numbers (patch features, latents, scaled counts), plus fixed sin-cos positions of the grid.

    Raises ValueError for tokens that are not P numbers, and for a grid that the width has no positions for.
    """

    def __init__(
        self,
        *,
        spec: FieldSpec,
        width: int,
        init: str | float = "xavier_uniform",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.features is None:
            raise ValueError(f"embed.name=patches reads vectors, and gets {spec}; use tokens")
        grid_positions(spec.grid, width)
        self.grid, self.width, self.dtype = spec.grid, width, dtype
        self.linear = linear(spec.features, width, init=init, bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, value: Float[Array, "*B N P"], place: Int[Array, "*B N axes"] | None = None
    ) -> Float[Array, "*B N D"]:
        """Vectors of tokens; `place` are their coordinates (row, column), where they differ from the grid's."""
        return self.linear(value) + grid_positions(self.grid, self.width, place).astype(self.dtype)
