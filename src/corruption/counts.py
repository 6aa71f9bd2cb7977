"""The counts process: pure death of counts below `vocab` (Blackout Diffusion, Santos et al. 2023).

1. q(x_t | x_0) = Binomial(x_0, p(t)). The published times of T steps have logit p equally spaced from L to -L,
   L = logit(1 - exp(-end)), at t = 1/T, ..., 1; between 0 and 1/T, 1 - p grows linearly from 0.
2. The reverse process is pure birth: with n = x_0 - x_t units missing,
       x_s = x_t + Binomial(n, (p(s) - p(t)) / (1 - p(t))).
3. The head outputs log(exp(rate) - 1), rate = E[x_0 - x_t | x_t]. Binomial needs an integer n: with the rate rounded to
   the nearest one, samples do not converge to the data distribution; with stochastic rounding they do.

Source: arXiv 2305.11089 and its published code (the times).
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import xlogy
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from src.corruption.base import TIME_SCALE, ProcessBase, expand
from src.corruption.schedules import as_time
from src.interfaces import Corrupted, FieldSpec

SNAP = 1e-3  # in units of one step: float32 errors of t T are far below it
ROUNDINGS = ("stochastic", "nearest", "poisson")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts(ProcessBase):
    """A process on counts [B, N, P]: P = `features` integers below `vocab`.

    field      spec of the counts; the embedder reads P centred floats instead
    steps      T, the number of published times
    end        -log p(1)
    rounding   of the rate: stochastic; nearest (as published); poisson: births are drawn from a Poisson distribution,
               also in the last step, to s = 0
    scale      the network reads (x_t - p(t) (vocab - 1) / 2) / scale; None: (vocab - 1) / 2. As published: 1

    Raises ValueError for a field without counts, an unknown rounding, steps < 2, end <= log 2, or scale <= 0.
    """

    SAMPLING: ClassVar[tuple[str, ...]] = ("rounding",)

    field: FieldSpec
    steps: int = 1000
    end: float | int = 15.0
    rounding: str = "stochastic"
    scale: float | int | None = None

    def __post_init__(self):
        if self.field.vocab is None or self.field.features is None:
            raise ValueError(f"Counts: the field must have vocab and features, but it has {self.field}.")
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"Counts: rounding {self.rounding!r} is unknown; take one of {ROUNDINGS}.")
        if self.steps < 2 or not self.end > math.log(2):
            raise ValueError(f"Counts: steps={self.steps} must be at least 2, and end={self.end} above log 2.")
        if self.scale is not None and not self.scale > 0:
            raise ValueError(f"Counts: scale is {self.scale}; give one above 0.")

    @property
    def inputs(self) -> FieldSpec:
        """P floats."""
        return dataclasses.replace(self.field, vocab=None)

    @property
    def outputs(self) -> int:
        """P."""
        return self.field.features

    @property
    def most(self) -> int:
        """The largest count."""
        return self.field.vocab - 1

    def _grid_position(self, t: ArrayLike) -> Float[Array, "..."]:
        """t T, an exact integer at the published times."""
        place = as_time(t) * self.steps
        nearest = jnp.round(place)
        return jnp.where(jnp.abs(place - nearest) < SNAP, nearest, place)

    def _keep_probability(self, place: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """p, 1 - p and logit p (infinite at t = 0) at t T = `place`."""
        end = math.log(math.expm1(self.end))
        early = math.exp(-self.end) * jnp.minimum(place, 1.0)
        logit = end * (1 - 2 * jnp.maximum(place - 1, 0.0) / (self.steps - 1))
        kept = jnp.where(place < 1, 1 - early, jax.nn.sigmoid(logit))
        lost = jnp.where(place < 1, early, jax.nn.sigmoid(-logit))
        return kept, lost, jnp.where(place < 1, jnp.log1p(-early) - jnp.log(early), logit)

    def _birth_probability(self, now: Float[Array, "..."], then: Float[Array, "..."]) -> tuple[Array, Array]:
        """(p' - p) / (1 - p) and (1 - p') / (1 - p) from the place `now` to the earlier `then` of p', by
        p' - p = p' (1 - p) (1 - exp(logit p - logit p')) without cancellation."""
        (_, lost, logit), (kept, lost_then, logit_then) = self._keep_probability(now), self._keep_probability(then)
        slope = 2 * math.log(math.expm1(self.end)) / (self.steps - 1)
        gap = jnp.where(then < 1, logit_then - logit, slope * (now - then))
        gap = jnp.where(now > then, gap, 0.0)
        divisor = jnp.where(lost > 0, lost, 1.0)
        return -kept * jnp.expm1(-gap), jnp.where(lost > 0, lost_then / divisor, 1.0)

    def keep_probability(self, t: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """p(t) and 1 - p(t), both without cancellation; exactly 1 and 0 at t = 0."""
        return self._keep_probability(self._grid_position(t))[:2]

    def birth_probability(self, t: ArrayLike, s: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """(p(s) - p(t)) / (1 - p(t)), the probability that a unit missing at t is present at s, and 1 minus it.

        Exactly 1 at s = 0 < t, and exactly 0 at s = t.
        """
        return self._birth_probability(self._grid_position(t), self._grid_position(s))

    def weights(self, t: ArrayLike) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Loss weights for t uniform on the T times: T p(t) (tau(t) - tau(u)) of the instantaneous form and
        T (p(u) - p(t)) of the finite one, with u the time before t and tau = -log p."""
        place = self._grid_position(t)
        kept, lost, _ = self._keep_probability(place)
        risen = lost * self._birth_probability(place, jnp.maximum(place - 1, 0.0))[0]
        return self.steps * kept * jnp.log1p(risen / kept), self.steps * risen

    def noise(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """A uniform number for each count."""
        return jax.random.uniform(key, (*shape, self.field.features))

    def corrupt(self, x0: Int[Array, "*B"], noise: Float[Array, "*B"], t: ArrayLike) -> Corrupted:
        """x_t, the binomial quantile at the noise; x_0 at t = 0."""
        xt = quantile(noise, x0, *self.keep_probability(expand(t, x0)), most=self.most)
        return Corrupted(x0=x0, xt=xt.astype(x0.dtype), t=t, noise=noise)

    def prior(self, key: Array, shape: tuple[int, ...], past: Array | None = None) -> Int[Array, "..."]:
        """x at t = 1: zeros."""
        return jnp.zeros((*shape, self.field.features), jnp.int32)

    def network(self, xt: Int[Array, "*B"], t: ArrayLike) -> tuple[Array, Array]:
        """x_t centred and scaled, and 1000 t."""
        kept, _ = self.keep_probability(expand(t, xt))
        scale = self.most / 2 if self.scale is None else self.scale
        return (xt - kept * self.most / 2) / scale, TIME_SCALE * as_time(t)

    def estimate(self, output: Float[Array, "*B"], xt: Int[Array, "*B"], t: ArrayLike) -> Float[Array, "*B"]:
        """The rate E[x_0 - x_t | x_t]."""
        return jax.nn.softplus(output.astype(jnp.float32))

    def hint(self, estimate: Float[Array, "*B"]) -> Float[Array, "*B"]:
        """The rate divided by the largest count."""
        return estimate / self.most

    def posterior(
        self, key: Array, xt: Int[Array, "*B"], estimate: Float[Array, "*B"], t: ArrayLike, s: ArrayLike
    ) -> Int[Array, "*B"]:
        """x_t plus a draw of the births between t and s; for s = 0 all missing units."""
        chance, rest = self.birth_probability(expand(t, xt), expand(s, xt))
        round_key, birth_key = jax.random.split(key)
        room = self.most - xt
        if self.rounding == "poisson":
            births = jax.random.poisson(birth_key, estimate * chance)
            return xt + jnp.minimum(births, room).astype(xt.dtype)
        if self.rounding == "nearest":
            missing = jnp.round(estimate)
        else:
            missing = jnp.floor(estimate + jax.random.uniform(round_key, xt.shape))
        missing = jnp.clip(missing, 0, room).astype(xt.dtype)
        births = quantile(jax.random.uniform(birth_key, xt.shape), missing, chance, rest, most=self.most)
        return xt + births.astype(xt.dtype)


def quantile(
    u: Float[Array, "*B"],
    trials: Int[Array, "*B"],
    chance: Float[Array, "..."],
    rest: Float[Array, "..."],
    most: int,
) -> Int[Array, "*B"]:
    """The smallest count at which the CDF of Binomial(trials, chance) exceeds u; never a count of probability 0.

    rest   1 - chance, without cancellation
    most   largest number of trials, the length of the loop
    """
    factorials = jnp.asarray(np.cumsum(np.log(np.maximum(np.arange(most + 1), 1))), jnp.float32)

    def body(carry: tuple[Array, Array], k: Array) -> tuple[tuple[Array, Array], None]:
        below, count = carry
        left = jnp.maximum(trials - k, 0)
        choose = factorials[trials] - factorials[k] - factorials[left]
        below = below + jnp.exp(choose + xlogy(1.0 * k, chance) + xlogy(1.0 * left, rest))
        return (below, count + ((below <= u) & (k < trials))), None

    start = jnp.zeros(trials.shape, jnp.float32), jnp.zeros(trials.shape, jnp.int32)
    return jax.lax.scan(body, start, jnp.arange(most))[0][1]
