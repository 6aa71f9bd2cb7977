"""Noise schedules: x_t = alpha(t) x_0 + sigma(t) eps, with t = 0 clean and t = 1 noise.

1. Any differentiable pair (alpha, sigma) is a schedule; log_snr = 2 log(alpha / sigma).
2. A jump s -> t (s <= t) is again Gaussian: x_t = alpha_ts x_s + sqrt(sigma2_ts) eps with
       alpha_ts = alpha_t / alpha_s,   sigma2_ts = sigma_t^2 - alpha_ts^2 sigma_s^2.
   The difference of squares cancels in float32, so every schedule gives `jump` in a form without cancellation.
3. A discrete process with n steps has abar_k = prod_{j <= k} (1 - beta_j); its index k sits at t = (k + 1) / n and
   t = 0 is clean (abar = 1). Between grid points log abar is linear in t, so that derivatives exist and ODE solvers
   may step anywhere. Respacing needs no new tables: the respaced beta of a jump s -> t is sigma2_ts.

Sources: Ho et al. 2020 (linear betas), Nichol & Dhariwal 2021 (cosine betas, clipped posterior variance),
Ma et al. 2024 "SiT" (Linear, GVP and VP interpolants), Kingma et al. 2021 (log-SNR).
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float

FLOOR = 1e-6  # smallest alpha or sigma in a divisor; its square is a normal float32, too
TINY = 1e-20  # smallest variance whose logarithm is taken
SNAP = 1e-3  # in units of one discrete step: float32 errors of t * steps are far below it


def as_time(t: ArrayLike) -> Float[Array, "..."]:
    """t as a floating-point array of any shape; integers (t = 0 or 1) are promoted."""
    return jnp.asarray(t, jnp.result_type(t, jnp.float32))


class Schedule:
    """The interface of every schedule. t and s have any shape; results have the (broadcast) shape of t (and s).

    t_min, t_max     range in which samplers may evaluate the network (inside the singular ends)
    discrete_steps   n for a table of n betas, None in continuous time
    """

    SAMPLING: ClassVar[tuple[str, ...]] = ("t_max",)  # options that change nothing but samples

    t_min: Any
    t_max: Any

    @property
    def discrete_steps(self) -> int | None:
        """Number of betas, None in continuous time."""
        return None

    def alpha(self, t: ArrayLike) -> Float[Array, "..."]:
        """Signal coefficient alpha(t)."""
        raise NotImplementedError

    def sigma(self, t: ArrayLike) -> Float[Array, "..."]:
        """Noise coefficient sigma(t)."""
        raise NotImplementedError

    def alpha_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """d alpha / dt."""
        raise NotImplementedError

    def sigma_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """d sigma / dt."""
        raise NotImplementedError

    def jump(self, t: ArrayLike, s: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(alpha_ts, sigma2_ts) of q(x_t | x_s) for s <= t, without cancellation (module docstring, 2)."""
        raise NotImplementedError

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """Input of the network's timestep embedding."""
        raise NotImplementedError

    def log_snr(self, t: ArrayLike) -> Float[Array, "..."]:
        """2 log(alpha / sigma), finite at both ends because alpha and sigma are floored there."""
        return 2 * (jnp.log(jnp.maximum(self.alpha(t), FLOOR)) - jnp.log(jnp.maximum(self.sigma(t), FLOOR)))

    def log_beta(self, t: ArrayLike, s: ArrayLike) -> Float[Array, "..."]:
        """log sigma2_ts: the (respaced) log beta of the jump s -> t, the upper end of the learned range."""
        return jnp.log(jnp.maximum(self.jump(t, s)[1], TINY))

    def posterior_log_variance(self, t: ArrayLike, s: ArrayLike) -> Float[Array, "..."]:
        """log(sigma2_ts sigma_s^2 / sigma_t^2) of q(x_s | x_t, x_0), clipped: the lower end of the learned range.

        At s = 0 the variance vanishes. Discrete schedules then give the value of the jump 1/n -> 2/n (Nichol &
        Dhariwal 2021: index 0 replaced by index 1); continuous ones floor sigma_s.
        """
        t, s = jnp.broadcast_arrays(as_time(t), as_time(s))
        if self.discrete_steps is not None:
            last = s * self.discrete_steps < SNAP
            t = jnp.where(last, 2 / self.discrete_steps, t)
            s = jnp.where(last, 1 / self.discrete_steps, s)
        sigmas = jnp.maximum(self.sigma(s), FLOOR) / jnp.maximum(self.sigma(t), FLOOR)
        return self.log_beta(t, s) + 2 * jnp.log(sigmas)


class VariancePreserving(Schedule):
    """alpha^2 + sigma^2 = 1. A subclass gives log abar = log alpha^2, its slope in t and its difference."""

    def log_abar(self, t: ArrayLike) -> Float[Array, "..."]:
        """log alpha(t)^2."""
        raise NotImplementedError

    def log_abar_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """d log alpha(t)^2 / dt."""
        raise NotImplementedError

    def log_abar_difference(self, t: ArrayLike, s: ArrayLike) -> Float[Array, "..."]:
        """log alpha(t)^2 - log alpha(s)^2 without cancellation."""
        raise NotImplementedError

    def alpha(self, t: ArrayLike) -> Float[Array, "..."]:
        """exp(log abar / 2)."""
        return jnp.exp(0.5 * self.log_abar(t))

    def sigma(self, t: ArrayLike) -> Float[Array, "..."]:
        """sqrt(1 - abar), by expm1 because abar is near 1 at small t."""
        return jnp.sqrt(-jnp.expm1(self.log_abar(t)))

    def alpha_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """alpha (log abar)' / 2."""
        return 0.5 * self.alpha(t) * self.log_abar_dot(t)

    def sigma_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """-abar (log abar)' / (2 sigma): sigma grows as sqrt(t), so the infinite slope at t = 0 is floored."""
        return -0.5 * jnp.exp(self.log_abar(t)) * self.log_abar_dot(t) / jnp.maximum(self.sigma(t), FLOOR)

    def jump(self, t: ArrayLike, s: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(abar_t / abar_s)^(1/2) and 1 - abar_t / abar_s."""
        difference = self.log_abar_difference(t, s)
        return jnp.exp(0.5 * difference), -jnp.expm1(difference)


# --------------------------------------------------------------------------- discrete tables


class Discrete(VariancePreserving):
    """A table of n betas in float64, kept as a sum of two float32 tables so that differences stay exact."""

    steps: int

    def betas(self) -> np.ndarray:
        """[n] float64, beta_k of index k."""
        raise NotImplementedError

    @functools.cached_property
    def _tables(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log abar at t = 0, 1/n, ..., 1 as high and low float32 parts [n + 1], and its slope in t [n]."""
        jumps = np.log1p(-self.betas())
        table = np.concatenate([[0.0], np.cumsum(jumps)])
        high = table.astype(np.float32)
        return high, (table - high).astype(np.float32), (jumps * self.steps).astype(np.float32)

    @property
    def discrete_steps(self) -> int | None:
        """n."""
        return self.steps

    @property
    def t_min(self) -> float:
        """The time of index 0."""
        return 1 / self.steps

    @property
    def t_max(self) -> float:
        """The time of index n - 1."""
        return 1.0

    def index(self, t: ArrayLike) -> Array:
        """k = round(t n) - 1 as an integer; -1 at t = 0."""
        return jnp.round(as_time(t) * self.steps).astype(jnp.int32) - 1

    def _interval(self, t: ArrayLike) -> tuple[Array, Array]:
        """The interval [j/n, (j+1)/n] below t and the fraction of it passed, exactly 1 at a grid point."""
        u = jnp.clip(as_time(t) * self.steps, 0, self.steps)
        nearest = jnp.round(u)
        u = jnp.where(jnp.abs(u - nearest) < SNAP, nearest, u)
        left = jnp.clip(jnp.ceil(u) - 1, 0, self.steps - 1)
        return left.astype(jnp.int32), u - left

    def _read(self, table: np.ndarray, t: ArrayLike) -> Array:
        left, fraction = self._interval(t)
        values = jnp.asarray(table)
        return (1 - fraction) * values[left] + fraction * values[left + 1]

    def log_abar(self, t: ArrayLike) -> Float[Array, "..."]:
        """The table, linear between its points."""
        return self._read(self._tables[0], t)

    def log_abar_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """Slope of the interval that ends at t: the one that a reverse step enters."""
        return jnp.asarray(self._tables[2])[self._interval(t)[0]]

    def log_abar_difference(self, t: ArrayLike, s: ArrayLike) -> Float[Array, "..."]:
        """Difference of the high parts (exact for neighbours) plus the difference of the low parts."""
        high, low, _ = self._tables
        return (self._read(high, t) - self._read(high, s)) + (self._read(low, t) - self._read(low, s))

    def log_snr(self, t: ArrayLike) -> Float[Array, "..."]:
        """log abar - log(1 - abar)."""
        log_abar = self.log_abar(t)
        return log_abar - jnp.log(jnp.maximum(-jnp.expm1(log_abar), FLOOR**2))

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """The original index k, fractional between grid points; clean data (t = 0) counts as index 0."""
        left, fraction = self._interval(t)
        return jnp.maximum(left + fraction - 1, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearBetas(Discrete):
    """beta_k from beta_start to beta_end in equal steps (Ho et al. 2020); the values are used as given for any `steps`.

    Raises ValueError unless steps >= 2 and 0 < beta < 1.
    """

    steps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 2e-2

    def __post_init__(self):
        if self.steps < 2 or not (0 < self.beta_start < 1 and 0 < self.beta_end < 1):
            raise ValueError(f"{self} is no schedule: give steps >= 2 and betas between 0 and 1.")

    def betas(self) -> np.ndarray:
        """[n] float64."""
        return np.linspace(self.beta_start, self.beta_end, self.steps, dtype=np.float64)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CosineBetas(Discrete):
    """abar(t) = cos^2((t + 0.008) / 1.008 pi/2), betas cut at max_beta (Nichol & Dhariwal 2021, eq. 17).

    Raises ValueError unless steps >= 2 and 0 < max_beta < 1.
    """

    steps: int = 1000
    max_beta: float = 0.999

    def __post_init__(self):
        if self.steps < 2 or not 0 < self.max_beta < 1:
            raise ValueError(f"{self} is no schedule: give steps >= 2 and max_beta between 0 and 1.")

    def betas(self) -> np.ndarray:
        """[n] float64."""
        grid = np.arange(self.steps + 1, dtype=np.float64) / self.steps
        level = np.cos((grid + 0.008) / 1.008 * np.pi / 2) ** 2
        return np.minimum(1 - level[1:] / level[:-1], self.max_beta)


# --------------------------------------------------------------------------- continuous interpolants


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """alpha = 1 - t, sigma = t: rectified flow (SiT "Linear"). A velocity network may also take t_max = 1."""

    time_scale: float = 1000.0
    t_min: float = 1e-3
    t_max: float = 1 - 1e-3

    def alpha(self, t: ArrayLike) -> Float[Array, "..."]:
        """1 - t."""
        return 1 - as_time(t)

    def sigma(self, t: ArrayLike) -> Float[Array, "..."]:
        """t."""
        return as_time(t)

    def alpha_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """-1."""
        return -jnp.ones_like(as_time(t))

    def sigma_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """1."""
        return jnp.ones_like(as_time(t))

    def jump(self, t: ArrayLike, s: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(1-t)/(1-s) and (t-s)(t+s-2ts)/(1-s)^2."""
        t, s = as_time(t), as_time(s)
        keep = jnp.maximum(1 - s, FLOOR)
        return (1 - t) / keep, (t - s) * (t + s - 2 * t * s) / keep**2

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """time_scale * t (SiT's official networks take time_scale = 1)."""
        return self.time_scale * as_time(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GVP(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (SiT "GVP"). A velocity network may also take t_max = 1."""

    time_scale: float = 1000.0
    t_min: float = 1e-3
    t_max: float = 1 - 1e-3

    def alpha(self, t: ArrayLike) -> Float[Array, "..."]:
        """cos(pi t / 2), written as a sine so that t = 1 gives exactly 0."""
        return jnp.sin(jnp.pi / 2 * (1 - as_time(t)))

    def sigma(self, t: ArrayLike) -> Float[Array, "..."]:
        """sin(pi t / 2)."""
        return jnp.sin(jnp.pi / 2 * as_time(t))

    def alpha_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """-pi/2 sigma."""
        return -jnp.pi / 2 * self.sigma(t)

    def sigma_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """pi/2 alpha."""
        return jnp.pi / 2 * self.alpha(t)

    def jump(self, t: ArrayLike, s: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """cos t / cos s and sin(t-s) sin(t+s) / cos^2 s (angles in units of pi/2)."""
        t, s = as_time(t), as_time(s)
        keep = jnp.maximum(self.alpha(s), FLOOR)
        return self.alpha(t) / keep, jnp.sin(jnp.pi / 2 * (t - s)) * jnp.sin(jnp.pi / 2 * (t + s)) / keep**2

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """time_scale * t (SiT's official networks take time_scale = 1)."""
        return self.time_scale * as_time(t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP(VariancePreserving):
    """log alpha = -t^2/4 (beta_max - beta_min) - t/2 beta_min: the VP SDE of Song et al. 2021 (SiT "VP")."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    time_scale: float = 1000.0
    t_min: float = 1e-3
    t_max: float = 1.0

    def log_abar(self, t: ArrayLike) -> Float[Array, "..."]:
        """2 log alpha."""
        return self.log_abar_difference(t, 0.0)

    def log_abar_dot(self, t: ArrayLike) -> Float[Array, "..."]:
        """-beta(t) = -(beta_min + t (beta_max - beta_min))."""
        return -(self.beta_min + as_time(t) * (self.beta_max - self.beta_min))

    def log_abar_difference(self, t: ArrayLike, s: ArrayLike) -> Float[Array, "..."]:
        """-(t - s) (beta_min + (t + s)/2 (beta_max - beta_min))."""
        t, s = as_time(t), as_time(s)
        return -(t - s) * (self.beta_min + 0.5 * (t + s) * (self.beta_max - self.beta_min))

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """time_scale * t (SiT's official networks take time_scale = 1)."""
        return self.time_scale * as_time(t)
