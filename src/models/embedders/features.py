"""Features of a frozen encoder -> vectors of the model's width."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.interfaces import FieldSpec
from src.models.layers import linear


class FeatureEmbedder(nnx.Module):
    """Linear, GELU, linear (LLaVA 1.5; MonoFormer's `im_embedder`); without positions, which the features contain.

    Raises ValueError for tokens that are not vectors.
    """

    def __init__(
        self,
        *,
        spec: FieldSpec,
        width: int,
        init: str | float = "lecun_normal",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.features is None:
            raise ValueError(f"embed.name=features reads vectors, and gets {spec}; use tokens")
        args = {"init": init, "bias": True, "dtype": dtype, "rngs": rngs}
        self.first, self.second = linear(spec.features, width, **args), linear(width, width, **args)

    def __call__(self, value: Float[Array, "*B N F"], place: Array | None = None) -> Float[Array, "*B N D"]:
        """Vectors of tokens; `place` is not used."""
        return self.second(jax.nn.gelu(self.first(value), approximate=False))
