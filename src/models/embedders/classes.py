"""A class of a whole row -> a conditioning vector."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.embedders.tokens import look_up
from src.models.layers import initializer


class ClassEmbedder(nnx.Module):
    """A table of `spec.vocab` classes and a last row for "no class" (classifier-free guidance).

    Raises ValueError for a field without classes.
    """

    def __init__(self, *, spec: FieldSpec, width: int, init: str | float = 0.02, dtype=jnp.float32, rngs: nnx.Rngs):
        if spec.vocab is None or spec.features is not None:
            raise ValueError(f"embed.name=classes reads a class index, and gets {spec}; use patches or features")
        self.table = nnx.Embed(spec.vocab + 1, width, embedding_init=initializer(init), dtype=dtype, rngs=rngs)

    def __call__(self, value: Int[Array, "*B"], place: Array | None = None) -> Float[Array, "*B D"]:
        """The vector of each class; `place` is not used."""
        return look_up(self.table.embedding[...], value, self.table.dtype)
