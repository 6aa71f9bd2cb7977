"""Ids -> vectors of the model's width."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from src.common.mesh.constraints import automatic_axes
from src.interfaces import FieldSpec
from src.models.embedders._places import grid_positions
from src.models.layers import initializer


class TokenEmbedder(nnx.Module):
    """A table of V rows: of words, of codes, of codes and the masks of a process.

    positions   `none`; or `sincos`: fixed positions of the field's grid are added, which ids of an image need where
                the trunk has no other

    Raises ValueError for tokens that are not ids, for unknown positions, and for `sincos` without a grid.
    """

    def __init__(
        self,
        *,
        spec: FieldSpec,
        width: int,
        init: str | float = 0.02,
        positions: str = "none",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.vocab is None or spec.features is not None:
            raise ValueError(f"embed.name=tokens reads ids, and gets {spec}; use patches")
        if positions not in ("none", "sincos"):
            raise ValueError(f"embed.positions={positions!r} is unknown; use none or sincos")
        self.grid, self.width = spec.grid if positions == "sincos" else None, width
        if self.grid is not None:
            grid_positions(self.grid, width)
        self.table = nnx.Embed(spec.vocab, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(
        self, value: Int[Array, "*B N"], place: Int[Array, "*B N axes"] | None = None
    ) -> Float[Array, "*B N D"]:
        """Vectors of ids; `place` are their coordinates, where they differ from the grid's."""
        x = look_up(self.table.embedding[...], value, self.table.dtype)
        return x if self.grid is None else x + grid_positions(self.grid, self.width, place).astype(x.dtype)


def look_up(table: Float[Array, "V D"], ids: Int[Array, "*N"], dtype: Any) -> Float[Array, "*N D"]:
    """table[ids] in `dtype`; the gradients of an id's occurrences are added in the dtype of the table.

    Over the mesh axis `tensor` each device finds the ids of its own piece of the vocabulary (Shoeybi et al. 2019).
    Written out, because XLA adds gradients to wrong rows when it partitions a look-up over `tensor` and `context`.
    """
    axes = automatic_axes()
    if "tensor" not in axes or table.shape[0] % axes["tensor"]:
        return jnp.take(table, ids, axis=0).astype(dtype)

    def piece(rows: Array, ids: Array) -> Array:
        place = ids - jax.lax.axis_index("tensor") * rows.shape[0]
        here = (place >= 0) & (place < rows.shape[0])
        found = jnp.take(rows, jnp.where(here, place, 0), axis=0).astype(dtype)
        return jax.lax.psum(jnp.where(here[..., None], found, 0), "tensor")

    split = jax.shard_map(
        piece,
        in_specs=(PartitionSpec("tensor"), PartitionSpec()),
        out_specs=PartitionSpec(),
        axis_names={"tensor", "context"} & set(axes),
    )
    return split(table, ids)
