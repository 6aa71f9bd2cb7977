"""DiTAR's aggregation: the vectors of a patch become one vector of the model's width.

A small bidirectional transformer reads the parts of a token behind one learned token, whose state is the patch's.

Source: Jia et al. 2025 "DiTAR" (arXiv 2502.03930: aggregation encoder).
"""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.embedders._places import grid_positions
from src.models.layers import LayerNorm, initializer, linear
from src.models.local import LocalTransformer, Parts


class AggregateEmbedder(nnx.Module):
    """The summary of a token's `parts` vectors, plus fixed sin-cos positions of the grid.

    parts            vectors of a token, neighbours among its P numbers
    depth, heads     of the small transformer, which has the model's width

    Raises ValueError for tokens that are not P numbers, for parts that do not divide P, and for sizes that do not fit.
    """

    def __init__(
        self,
        *,
        spec: FieldSpec,
        width: int,
        parts: int,
        depth: int = 1,
        heads: int = 4,
        init: str | float = "xavier_uniform",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.features is None or spec.vocab is not None:
            raise ValueError(f"embed.name=aggregate reads vectors, and gets {spec}; use tokens")
        grid_positions(spec.grid, width)
        self.grid, self.width, self.dtype = spec.grid, width, dtype
        args = {"init": init, "dtype": dtype, "rngs": rngs}
        self.parts = Parts(spec.features, parts, width, "embed", bias=True, **args)
        self.summary = nnx.Param(initializer("normal:0.02")(rngs.params(), (width,), jnp.float32))
        self.local = LocalTransformer(width, depth, heads, timed=False, **args)
        self.norm = LayerNorm(width, dtype=dtype)
        self.linear = linear(width, width, bias=True, **args)

    def __call__(
        self, value: Float[Array, "*B N P"], place: Int[Array, "*B N axes"] | None = None
    ) -> Float[Array, "*B N D"]:
        """Vectors of tokens; `place` are their coordinates (row, column), where they differ from the grid's."""
        parts = self.parts(value.reshape(-1, value.shape[-1]))
        summary = jnp.broadcast_to(self.summary[...].astype(self.dtype), (parts.shape[0], 1, self.width))
        x = self.linear(self.norm(self.local(jnp.concatenate([summary, parts], axis=1))[:, 0]))
        x = x.reshape(*value.shape[:-1], self.width)
        return x + grid_positions(self.grid, self.width, place).astype(self.dtype)
