"""The Gaussian corruption process.

1. Forward: x_t = a x_0 + s eps, eps ~ N(0, I), with a = alpha(t), s = sigma(t).
2. The head predicts one of five parameterizations, which determines the others (`_parameterizations.py`).
3. A jump u -> t, u < t, has alpha_tu = alpha_t / alpha_u and sigma2_tu = sigma_t^2 - alpha_tu^2 sigma_u^2, so by Bayes
       q(x_u | x_t, x_0) = N( alpha_tu sigma_u^2 / sigma_t^2 x_t + alpha_u sigma2_tu / sigma_t^2 x_0,
                              sigma2_tu sigma_u^2 / sigma_t^2 ).
   With u the next kept index this is respaced DDPM sampling; no respaced tables are needed.
4. Learned range: log variance = f log sigma2_tu + (1 - f) log(clipped posterior variance), f = (logit + 1) / 2.

Sources: Ho et al. 2020 (1, 3), Nichol & Dhariwal 2021 (4).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption._grids import time_grid
from src.corruption._parameterizations import PARAMETERIZATIONS, Estimate, coefficients, convert, express
from src.corruption.base import ProcessBase, expand
from src.corruption.schedules import FLOOR, Schedule
from src.interfaces import Corrupted, FieldSpec

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gaussian(ProcessBase):
    """x_t = alpha x_0 + sigma eps on x [B, N, P] (any number of middle axes), times [], [B], [B, 1] or [B, N].

    field              spec of the vectors
    schedule           a class of `schedules.py`
    parameterization   of the head's P values: eps, x0, v, velocity or score
    variance           of the reverse step: fixed_small (posterior), fixed_large (beta), or learned_range, for which
                       the head outputs P logits after the P values

    Raises ValueError for a field without vectors, and for an unknown parameterization or variance.
    """

    field: FieldSpec
    schedule: Schedule
    parameterization: str = "eps"
    variance: str = "fixed_small"

    def __post_init__(self):
        if self.field.features is None or self.field.vocab is not None:
            raise ValueError(f"Gaussian: the field must have vectors (features, no vocab), but it has {self.field}.")
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"Gaussian: parameterization {self.parameterization!r} is unknown; take one of {PARAMETERIZATIONS}."
            )
        if self.variance not in VARIANCES:
            raise ValueError(f"Gaussian: variance {self.variance!r} is unknown; take one of {VARIANCES}.")

    @property
    def outputs(self) -> int:
        """P, or 2 P with a learned variance."""
        return self.field.features * (2 if self.variance == "learned_range" else 1)

    @property
    def guided(self) -> int:
        """P: guidance does not change the variance."""
        return self.field.features

    def noise(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "*B N P"]:
        """eps ~ N(0, I)."""
        return jax.random.normal(key, (*shape, self.field.features))

    def corrupt(self, x0: Float[Array, "*B N P"], noise: Float[Array, "*B N P"], t: ArrayLike) -> Corrupted:
        """x_t = alpha x_0 + sigma eps; where t = 0 it is x_0 bit for bit."""
        time = expand(t, x0)
        a, s = self.schedule.alpha(time), self.schedule.sigma(time)
        return Corrupted(x0=x0, xt=jnp.where(time > 0, a * x0 + s * noise, x0), t=t, noise=noise)

    def targets(self, c: Corrupted) -> dict[str, Float[Array, "*B N P"]]:
        """Targets of the prediction in all five parameterizations, from x_0 and the noise."""
        return express(coefficients(self.schedule, c.t, c.x0), c.x0, c.noise)

    def prior(self, key: Array, shape: tuple[int, ...], past: Array | None = None) -> Float[Array, "*B N P"]:
        """x at t = 1: N(0, I)."""
        return self.noise(key, shape)

    def times(self, steps: int) -> Float[Array, " T"]:
        """The schedule's uniform grid (`_grids.py`)."""
        return time_grid(self.schedule, steps)

    def network(self, xt: Float[Array, "*B N P"], t: ArrayLike) -> tuple[Array, Array]:
        """x_t, and the schedule's `time_input`."""
        return xt, self.schedule.time_input(t)

    def split(self, output: Float[Array, "*B N O"]) -> tuple[Array, Array | None]:
        """A head's output as value and logits of the variance, None if that is fixed.

        Raises ValueError for a wrong number of outputs.
        """
        if output.shape[-1] != self.outputs:
            raise ValueError(
                f"Gaussian: the head outputs {output.shape[-1]} numbers per token instead of {self.outputs}."
            )
        if self.outputs == self.guided:
            return output, None
        return output[..., : self.guided], output[..., self.guided :]

    def estimate(self, output: Float[Array, "*B N O"], xt: Float[Array, "*B N P"], t: ArrayLike) -> Estimate:
        """The head's value in all five parameterizations, and its variance."""
        value, variance = self.split(output)
        return self.convert(value, xt, t, variance)

    def convert(
        self, value: Float[Array, "*B N P"], xt: Float[Array, "*B N P"], t: ArrayLike, variance: Array | None = None
    ) -> Estimate:
        """The estimate of a value in the process's own parameterization."""
        return convert(coefficients(self.schedule, t, xt), self.parameterization, value, xt, variance)

    def from_x0(
        self, x0: Float[Array, "*B N P"], estimate: Estimate, xt: Float[Array, "*B N P"], t: ArrayLike
    ) -> Estimate:
        """The estimate with another x_0 (clipped, for example) and the other four parameterizations to match."""
        return convert(coefficients(self.schedule, t, xt), "x0", x0, xt, estimate.variance)

    def hint(self, estimate: Estimate) -> Float[Array, "*B N P"]:
        """x_0."""
        return estimate.x0

    def posterior_moments(
        self, xt: Float[Array, "*B N P"], estimate: Estimate, t: ArrayLike, s: ArrayLike
    ) -> tuple[Float[Array, "*B N P"], Float[Array, "*B N P"]]:
        """Mean and log variance of p(x_s | x_t) for any 0 <= s <= t (docstring of the module, 3 and 4).

        A token with s = t keeps its value. Raises ValueError for learned_range and an estimate without variance.
        """
        log_variance = self._log_variance(estimate.variance, expand(t, xt), expand(s, xt))
        mean = self.posterior_mean(xt, estimate.x0, t, s)
        return mean, jnp.broadcast_to(log_variance, mean.shape)

    def posterior(
        self, key: Array, xt: Float[Array, "*B N P"], estimate: Estimate, t: ArrayLike, s: ArrayLike
    ) -> Float[Array, "*B N P"]:
        """One draw from p(x_s | x_t); the mean where s = 0."""
        mean, log_variance = self.posterior_moments(xt, estimate, t, s)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + jnp.where(expand(s, xt) > 0, jnp.exp(0.5 * log_variance) * noise, 0.0)

    def posterior_mean(
        self, xt: Float[Array, "*B N P"], x0: Float[Array, "*B N P"], t: ArrayLike, s: ArrayLike
    ) -> Float[Array, "*B N P"]:
        """Mean of q(x_s | x_t, x_0)."""
        t, s = expand(t, xt), expand(s, xt)
        alpha_ts, variance_ts = self.schedule.jump(t, s)
        variance_t, variance_s = self.schedule.sigma(t) ** 2, self.schedule.sigma(s) ** 2
        divisor = jnp.maximum(variance_t, FLOOR**2)
        ratio = jnp.where(variance_t > 0, variance_s / divisor, 1.0)  # 0/0 for a clean token, which is kept
        return alpha_ts * ratio * xt + self.schedule.alpha(s) * variance_ts / divisor * x0

    def _log_variance(self, logits: Array | None, t: Array, s: Array) -> Array:
        small = self.schedule.posterior_log_variance(t, s)
        large = self.schedule.log_beta(t, s)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            # the step to s = 0 takes the clipped posterior variance (Nichol & Dhariwal 2021)
            return jnp.where(s > 0, large, small)
        if logits is None:
            raise ValueError(
                "Gaussian: variance is learned_range, but the estimate has none; the head must output logits."
            )
        fraction = (logits + 1) / 2
        return fraction * large + (1 - fraction) * small
