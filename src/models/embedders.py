"""How each kind of segment becomes vectors of the model's width."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from src.common.mesh.constraints import automatic_axes
from src.models.layers import initializer, linear, sincos_1d, sincos_2d


class TokenEmbedder(nnx.Module):
    """Text ids -> vectors, a table of V rows."""

    def __init__(self, vocab: int, width: int, *, init: str | float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        self.table = nnx.Embed(vocab, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B N"]) -> Float[Array, "B N D"]:
        return look_up(self.table.embedding[...], ids, self.table.dtype)


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


class PatchEmbedder(nnx.Module):
    """Patch features -> vectors: a linear layer, plus fixed 2-D sin-cos positions of the patch grid.

    The grid is the same for all images, or, in buckets of aspect ratios, given for each: (rows, columns), whose product
    is always N.
    """

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

    def __call__(self, patches: Float[Array, "B N P"], grid: Int[Array, "B 2"] | None = None) -> Float[Array, "B N D"]:
        if grid is None:
            return self.linear(patches) + jnp.asarray(sincos_2d(*self.grid, self.width), self.dtype)
        tokens = np.arange(self.grid[0] * self.grid[1])
        columns = jnp.maximum(grid[:, 1:], 1)  # where there is no image, there is none
        table = jnp.asarray(sincos_1d(tokens, self.width), self.dtype)
        places = jnp.concatenate([table[tokens % columns], table[tokens // columns]], axis=-1)
        return self.linear(patches) + places


class VisionEmbedder(nnx.Module):
    """Features of a frozen encoder -> vectors: linear, GELU, linear (LLaVA 1.5; MonoFormer's `im_embedder`)."""

    def __init__(
        self, features: int, width: int, *, init: str | float = "lecun_normal", dtype=jnp.float32, rngs: nnx.Rngs
    ):
        args = {"init": init, "bias": True, "dtype": dtype, "rngs": rngs}
        self.first, self.second = linear(features, width, **args), linear(width, width, **args)

    def __call__(self, features: Float[Array, "B N F"]) -> Float[Array, "B N D"]:
        return self.second(jax.nn.gelu(self.first(features), approximate=False))


class LabelEmbedder(nnx.Module):
    """Class index -> conditioning vector; the last row stands for "no class" (classifier-free guidance)."""

    def __init__(self, classes: int, width: int, *, init: str | float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        self.table = nnx.Embed(classes + 1, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(self, ids: Int[Array, "B"]) -> Float[Array, "B D"]:
        return look_up(self.table.embedding[...], ids, self.table.dtype)
