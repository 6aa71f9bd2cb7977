"""Dense attention by XLA: the reference, on every platform, for every shape, with or without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from src.interfaces import SequenceSpec
from src.models.attention import Sizes
from src.sequence.mask import visible

HIDDEN = -0.7 * float(jnp.finfo(jnp.float32).max)  # exp gives 0, and two of them can be added


class Dense:
    """softmax(q kᵀ / √h + mask) v with all scores in memory, in f32 whatever the dtype of q.

    A query that sees nothing (padding) gets the mean of v, never NaN. The formula is `jax.nn.dot_product_attention`'s;
    written with one batch axis less where heads are not grouped, it is faster on CPU.
    """

    def __init__(self, query: SequenceSpec, key: SequenceSpec, sizes: Sizes):
        mask = visible(query, key)
        self.mask = jnp.broadcast_to(mask, (sizes.rows, *mask.shape[-2:]))[:, None]

    @staticmethod
    def refusal(sizes: Sizes) -> str | None:
        """Why it cannot be used for such arrays: it always can."""
        return None

    def __call__(
        self, q: Float[Array, "B Q H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"]
    ) -> Float[Array, "B Q H h"]:
        shape, groups = q.shape, q.shape[2] // k.shape[2]
        k, v, mask, g = k.astype(q.dtype), v.astype(q.dtype), self.mask, ""
        if groups > 1:
            q, mask, g = q.reshape(*shape[:2], -1, groups, shape[3]), mask[:, None], "g"
        scores = jnp.einsum(f"bqk{g}h,bskh->bk{g}qs", q, k, preferred_element_type=jnp.float32) * shape[-1] ** -0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, HIDDEN), axis=-1).astype(q.dtype)
        out = jnp.einsum(f"bk{g}qs,bskh->bqk{g}h", weights, v).reshape(shape)
        return checkpoint_name(out, "attention")  # splash names more: its normalizer too
