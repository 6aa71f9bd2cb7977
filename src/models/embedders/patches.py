"""Vectors of a grid -> vectors of the model's width."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.embedders._places import grid_positions
from src.models.embedders.tokens import look_up
from src.models.layers import linear


class PatchEmbedder(nnx.Module):
    """A linear layer of P numbers (patch features, latents, scaled counts), plus positions of the grid.

    positions   sincos: fixed; trained: a table that begins with them, for the field's own grid (no buckets)

    Raises ValueError for tokens that are not P numbers, for unknown positions, and for a grid that the width has no
    positions for.
    """

    def __init__(
        self,
        *,
        spec: FieldSpec,
        width: int,
        init: str | float = "xavier_uniform",
        positions: str = "sincos",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.features is None:
            raise ValueError(f"embed.name=patches reads vectors, and gets {spec}; use tokens")
        if positions not in ("sincos", "trained"):
            raise ValueError(f"embed.positions={positions!r} is unknown; use sincos or trained")
        first = grid_positions(spec.grid, width)
        self.grid, self.width, self.dtype = spec.grid, width, dtype
        begin = {"embedding_init": lambda *_: first, "dtype": dtype, "rngs": rngs}
        self.table = nnx.Embed(len(first), width, **begin) if positions == "trained" else None
        self.linear = linear(spec.features, width, init=init, bias=True, dtype=dtype, rngs=rngs)

    def __call__(
        self, value: Float[Array, "*B N P"], place: Int[Array, "*B N axes"] | None = None
    ) -> Float[Array, "*B N D"]:
        """Vectors of tokens; `place` are their coordinates (row, column), where they differ from the grid's."""
        if self.table is not None:
            place = np.stack(np.unravel_index(np.arange(value.shape[-2]), self.grid), -1) if place is None else place
            number = sum(place[..., axis] * math.prod(self.grid[axis + 1 :]) for axis in range(len(self.grid)))
            return self.linear(value) + look_up(self.table.embedding[...], jnp.asarray(number), self.dtype)
        return self.linear(value) + grid_positions(self.grid, self.width, place).astype(self.dtype)
