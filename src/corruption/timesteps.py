"""Samplers of training timesteps: `(key, shape) -> t`, float32 in [0, 1].

Sources: Ho et al. 2020 (Grid), Kingma et al. 2021 (stratified times), Esser et al. 2024 "SD3" (LogitNormal, Shifted).
"""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

TimestepSampler = Callable[[Array, tuple[int, ...]], Array]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Uniform:
    """Independent and uniform on [t_min, t_max)."""

    t_min: float = 0.0
    t_max: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times of the given shape."""
        return jax.random.uniform(key, shape, minval=self.t_min, maxval=self.t_max)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stratified:
    """One time in each of n = prod(shape) equal parts of [t_min, t_max), in random order.

    Each time alone is uniform; the mean of a loss over the batch has less variance. The order is random so that time
    does not depend on the row.
    """

    t_min: float = 0.0
    t_max: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times of the given shape."""
        order, jitter = jax.random.split(key)
        n = math.prod(shape)
        u = (jax.random.permutation(order, n) + jax.random.uniform(jitter, (n,))) / n
        # n - 1 + u rounds up to n in float32 when n is large
        u = jnp.minimum(u, jnp.nextafter(jnp.float32(1), jnp.float32(0)))
        return (self.t_min + (self.t_max - self.t_min) * u).reshape(shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LogitNormal:
    """sigmoid(N(mean, std^2)): more weight on middle times, for mean > 0 on noisier ones (SD3, eq. 19)."""

    mean: float = 0.0
    std: float = 1.0

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times of the given shape."""
        return jax.nn.sigmoid(self.mean + self.std * jax.random.normal(key, shape))


def shift_time(t: Float[Array, "..."], shift: float) -> Float[Array, "..."]:
    """shift t / (1 + (shift - 1) t): fixes 0 and 1, moves the rest towards noise for shift > 1 (SD3, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sway_time(t: Float[Array, "..."], sway: float) -> Float[Array, "..."]:
    """t - sway (sin(pi t / 2) - t): fixes 0 and 1, moves the rest towards noise for sway < 0.

    0: as it was; -1: sin(pi t / 2) (Chen et al. 2024 "F5-TTS", where time is 1 - t).
    """
    return t - sway * (jnp.sin(jnp.pi / 2 * t) - t)


def check_sway(sway: float) -> None:
    """Raises ValueError for a sway with which times would turn back."""
    most = 2 / (math.pi - 2)
    if not -1 <= sway <= most:
        raise ValueError(f"sway={sway} would turn times back; give -1 to {most:.3f}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shifted:
    """Times of `base`, shifted towards noise for shift > 1, as larger images need (SD3, eq. 23).

    Raises ValueError unless shift > 0.
    """

    base: TimestepSampler = Uniform()
    shift: float = 1.0

    def __post_init__(self):
        if self.shift <= 0:
            raise ValueError(f"Shifted: shift is {self.shift}; it must be above 0.")

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times of the given shape."""
        return shift_time(self.base(key, shape), self.shift)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Uniform over (k + 1) / steps, k < steps: the times of a discrete process (Ho et al. 2020, algorithm 1)."""

    steps: int = 1000

    def __call__(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Times of the given shape."""
        return (jax.random.randint(key, shape, 0, self.steps) + 1) / self.steps
