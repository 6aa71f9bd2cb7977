"""Schedules of a categorical process: abar(t) = the probability that a token is kept, 1 at t = 0.

Every class has `keep`, which is abar(t), and `slope`, its derivative, both of the shape of t; `places` is the number of
tokens of a schedule that differs from token to token, else None.

Sources: Sahoo et al. 2024 "MDLM" (linear, cosine powers, geometric), Chang et al. 2022 "MaskGIT" (cosine, early,
exponential, log), Shi et al. 2024 "MD4" (power), Kong et al. 2023 "M2DM" (by place).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption.schedules import as_time


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearDecay:
    """1 - (1 - least) t.

    least   abar(1) (MDLM: 0.001)
    """

    places: ClassVar[int | None] = None
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

    places: ClassVar[int | None] = None

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return 1 - jnp.sin(jnp.pi / 2 * as_time(t))

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return -jnp.pi / 2 * jnp.cos(jnp.pi / 2 * as_time(t))


@dataclasses.dataclass(frozen=True, kw_only=True)
class PowerDecay:
    """1 - t^exponent. Raises ValueError unless exponent > 0."""

    places: ClassVar[int | None] = None
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosinePower:
    """least + (1 - least) cos(pi t / 2)^exponent (MDLM: least 0.001, exponent 1 "cosine" or 2 "cosine squared").

    Raises ValueError unless exponent >= 1 and 0 <= least < 1.
    """

    places: ClassVar[int | None] = None
    exponent: float | int = 1.0
    least: float | int = 0.0

    def __post_init__(self):
        if self.exponent < 1 or not 0 <= self.least < 1:
            raise ValueError(
                f"CosinePower: exponent={self.exponent} must be at least 1, and least={self.least} in [0, 1)."
            )

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return self.least + (1 - self.least) * _cosine(t) ** self.exponent

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        inner = -jnp.pi / 2 * jnp.sin(jnp.pi / 2 * as_time(t))
        return (1 - self.least) * self.exponent * _cosine(t) ** (self.exponent - 1) * inner


@dataclasses.dataclass(frozen=True, kw_only=True)
class EarlyDecay:
    """(1 - t)^exponent: most tokens are replaced early (MaskGIT's "pow"). Raises ValueError unless exponent >= 1."""

    places: ClassVar[int | None] = None
    exponent: float | int = 2.0

    def __post_init__(self):
        if self.exponent < 1:
            raise ValueError(f"EarlyDecay: exponent is {self.exponent}; give at least 1, or take PowerDecay.")

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return (1 - as_time(t)) ** self.exponent

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return -self.exponent * (1 - as_time(t)) ** (self.exponent - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExponentialDecay:
    """total^-t (MaskGIT's "exp"); abar(1) is 1 / total. Raises ValueError unless total > 1."""

    places: ClassVar[int | None] = None
    total: float | int

    def __post_init__(self):
        if not self.total > 1:
            raise ValueError(f"ExponentialDecay: total is {self.total}; give the number of tokens, above 1.")

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return jnp.exp(-math.log(self.total) * as_time(t))

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t)."""
        return -math.log(self.total) * self.keep(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogDecay:
    """1 + log(1 - t) / log(total), at least 0 (MaskGIT's "log"). Raises ValueError unless total > 1."""

    places: ClassVar[int | None] = None
    total: float | int

    def __post_init__(self):
        if not self.total > 1:
            raise ValueError(f"LogDecay: total is {self.total}; give the number of tokens, above 1.")

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        left = jnp.maximum(1 - as_time(t), 1 / self.total)
        return jnp.maximum(1 + jnp.log(left) / math.log(self.total), 0.0)

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t), 0 where no token is kept."""
        left = 1 - as_time(t)
        inside = left > 1 / self.total
        return jnp.where(inside, -1 / (math.log(self.total) * jnp.where(inside, left, 1.0)), 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GeometricRate:
    """exp(-first^(1 - t) last^t), and 1 at t = 0 (MDLM's "geometric": 1e-4 and 20). It jumps to exp(-first) at 0.

    Raises ValueError unless 0 < first < last.
    """

    places: ClassVar[int | None] = None
    first: float | int = 1e-4
    last: float | int = 20.0

    def __post_init__(self):
        if not 0 < self.first < self.last:
            raise ValueError(f"GeometricRate: first={self.first} must lie above 0 and below last={self.last}.")

    def total(self, t: ArrayLike) -> Float[Array, "..."]:
        """-log abar(t), for t > 0."""
        t = as_time(t)
        return jnp.exp((1 - t) * math.log(self.first) + t * math.log(self.last))

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t)."""
        return jnp.where(as_time(t) > 0, jnp.exp(-self.total(t)), 1.0)

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t), from above at 0."""
        total = self.total(t)
        return -total * math.log(self.last / self.first) * jnp.exp(-total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ByPlace:
    """base(t) + strength w_n sin(pi t) for the token at place n: important tokens are replaced later than others.

    w is `importance` less its mean, divided by its largest absolute value (0 if all are equal). With a strength of 0 it
    is `base`. The form of the bend is our reading of "M2DM" (Kong et al. 2023), whose formula is not public to us.

    importance   a number for each token of the field, in its order

    Raises ValueError for no importance, one that is not finite, and a strength with which some abar would rise.
    """

    importance: Sequence[float | int]
    base: Any = dataclasses.field(default_factory=LinearDecay)
    strength: float | int = 0.2

    def __post_init__(self):
        found = np.asarray(self.importance, np.float64)
        if found.ndim != 1 or not found.size or not np.isfinite(found).all():
            raise ValueError(f"ByPlace: importance has shape {found.shape}; give one finite number for each token.")
        object.__setattr__(self, "importance", tuple(found.tolist()))
        times = np.linspace(0, 1, 1001)
        bend = np.pi * np.cos(np.pi * times)
        slopes = np.asarray(self.base.slope(times), np.float64)
        worst = max((slopes + self.strength * w * bend).max() for w in (self.weights.min(), self.weights.max()))
        if worst > 1e-6:
            raise ValueError(
                f"ByPlace: with strength={self.strength} some tokens would be restored as t grows; take a smaller one."
            )

    @property
    def places(self) -> int:
        """Number of tokens."""
        return len(self.importance)

    @property
    def weights(self) -> Float[np.ndarray, " N"]:
        """w of each token."""
        centred = np.asarray(self.importance) - np.mean(self.importance)
        return np.float32(centred / max(np.abs(centred).max(), 1e-30))

    def keep(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar(t) of each token; the last axis of t is N or 1. Raises ValueError for another one."""
        t = self._checked(t)
        return self.base.keep(t) + self.strength * self.weights * jnp.where(t < 1, jnp.sin(jnp.pi * t), 0.0)

    def slope(self, t: ArrayLike) -> Float[Array, "..."]:
        """abar'(t) of each token."""
        t = self._checked(t)
        return self.base.slope(t) + self.strength * self.weights * jnp.pi * jnp.cos(jnp.pi * t)

    def _checked(self, t: ArrayLike) -> Float[Array, "..."]:
        t = as_time(t)
        if t.ndim and t.shape[-1] not in (1, self.places):
            raise ValueError(
                f"ByPlace: there are {self.places} tokens, but times of shape {t.shape}; give one for each."
            )
        return t


def _cosine(t: ArrayLike) -> Float[Array, "..."]:
    return jnp.where(as_time(t) < 1, jnp.cos(jnp.pi / 2 * as_time(t)), 0.0)
