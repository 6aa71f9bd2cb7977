"""Flash attention of cuDNN, on NVIDIA GPUs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from src.interfaces import SequenceSpec
from src.models.attention import Sizes
from src.models.backends._mesh import split
from src.sequence.mask import visible


class Cudnn:
    """softmax(q kᵀ / √h + mask) v without the scores in memory; the mask `[B, 1, Q, S]` is, once for all heads.

    It takes bfloat16 and float16, head sizes up to 128 that divide by 8, and even lengths, to which rows are padded
    here. It runs under `shard_map`, since its own rule of partitioning refuses queries that are split, or otherwise
    than the keys.

    Its statistics have no name, so every `remat` but `none` runs it again in the backward pass.

    Not run yet: no GPU was at hand. What is around the kernel is tested, with another one in its place.
    """

    def __init__(self, query: SequenceSpec, key: SequenceSpec, sizes: Sizes):
        self.axes = split(sizes)
        parts = 2 * self.axes.contexts
        self.tail = -sizes.queries % parts
        mask = visible(query, key)
        mask = jnp.broadcast_to(mask, (sizes.rows, *mask.shape[-2:]))[:, None]
        self.mask = jnp.pad(mask, ((0, 0), (0, 0), (0, self.tail), (0, self.tail)))

    @staticmethod
    def refusal(sizes: Sizes) -> str | None:
        """Why it cannot be used for such arrays, or None."""
        if sizes.platform not in ("gpu", "cuda"):
            return f"runs on NVIDIA GPUs, not on {sizes.platform}"
        if sizes.queries != sizes.keys:
            return f"needs as many queries as keys, not {sizes.queries} and {sizes.keys}"
        if jnp.dtype(sizes.dtype) not in (jnp.bfloat16, jnp.float16):
            return f"computes in bfloat16 or float16, not {jnp.dtype(sizes.dtype).name}"
        if sizes.head_dim % 8 or sizes.head_dim > 128:
            return f"needs a head size up to 128 that divides by 8, not {sizes.head_dim}"
        return None

    def __call__(
        self, q: Float[Array, "B Q H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"]
    ) -> Float[Array, "B Q H h"]:
        tail = ((0, 0), (0, self.tail), (0, 0), (0, 0))
        qkv = (jnp.pad(a, tail) for a in (q, k.astype(q.dtype), v.astype(q.dtype)))
        run = lambda mask, *qkv: jax.nn.dot_product_attention(*qkv, mask=mask, implementation="cudnn")
        masks = PartitionSpec(self.axes.rows, None, self.axes.context)
        return self.axes.over(run, masks)(self.mask, *qkv)[:, : q.shape[1]]
