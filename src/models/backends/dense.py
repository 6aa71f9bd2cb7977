"""Dense attention by XLA: the reference, on every platform, for every shape, with or without a cache."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from src.interfaces import SequenceSpec
from src.models.attention import Sizes
from src.sequence.mask import visible


class Dense:
    """softmax(q kᵀ / √h + mask) v with the scores in memory, softmax in f32.

    A query that sees nothing (padding) gets the mean of v, never NaN.
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
        return jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=self.mask)
