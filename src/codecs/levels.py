"""Counts: numbers in [-1, 1] <-> whole numbers, on the device."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec


@dataclasses.dataclass(frozen=True)
class Levels:
    """-1 is the count 0, 1 is `levels` - 1, what lies between goes to the nearest; a token has P of them.

    before   the link in front, whose tokens are vectors

    Raises ValueError for less than 2 levels, and for tokens that are no vectors.
    """

    where: ClassVar[str] = "device"

    levels: int
    before: Any

    def __post_init__(self):
        if self.levels < 2:
            raise ValueError(f"levels={self.levels} must be at least 2")
        spec = self.before.spec
        if spec is None or spec.features is None or spec.vocab is not None:
            raise ValueError("levels needs a link in front whose tokens are vectors, as {'name': 'patch', 'size': 2}")

    @property
    def spec(self) -> FieldSpec:
        """Of the tokens."""
        return dataclasses.replace(self.before.spec, vocab=self.levels)

    @property
    def shape(self) -> tuple[int, ...]:
        """Tokens of one value, and counts of each."""
        return self.before.shape

    def encode(self, value: Float[Array, "*B N P"]) -> Int[Array, "*B N P"]:
        """Counts of vectors; numbers outside of [-1, 1] go to the ends."""
        return jnp.round((jnp.clip(value, -1, 1) + 1) * (0.5 * (self.levels - 1))).astype(jnp.int32)

    def decode(self, tokens: Int[Array, "*B N P"]) -> Float[Array, "*B N P"]:
        """Vectors of counts, f32."""
        return tokens.astype(jnp.float32) * (2 / (self.levels - 1)) - 1
