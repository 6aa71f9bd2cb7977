"""Schedules of a categorical process: abar(t) = the probability that a token is kept, 1 at t = 0.

Every class has `keep`, which is abar(t), and `slope`, its derivative, both of the shape of t.

Sources: Sahoo et al. 2024 "MDLM" (linear), Chang et al. 2022 "MaskGIT" (cosine), Shi et al. 2024 "MD4" (power).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption.schedules import as_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """1 - (1 - least) t.

    least   abar(1) (MDLM: 0.001)
    """

    least: float | int = 0.0

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return 1 - (1 - self.least) * as_time(t)

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return jnp.full_like(as_time(t), self.least - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineDecay:
    """1 - sin(pi t / 2): MaskGIT's cosine schedule, with few tokens unmasked in the early sampling steps."""

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return 1 - jnp.sin(jnp.pi / 2 * as_time(t))

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return -jnp.pi / 2 * jnp.cos(jnp.pi / 2 * as_time(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerDecay:
    """1 - t^exponent. Raises ValueError unless exponent > 0."""

    exponent: float | int = 2.0

    def __post_init__(self):
        if not self.exponent > 0:
            raise ValueError(f"Power: exponent is {self.exponent}; give one above 0.")

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return 1 - as_time(t) ** self.exponent

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return -self.exponent * as_time(t) ** (self.exponent - 1)
