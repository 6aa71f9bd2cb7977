"""The Gaussian corruption process.

1. Forward: x_t = a x_0 + s eps, eps ~ N(0, I), with a = alpha(t), s = sigma(t).
2. Five ways to say the same thing about x_t:
       eps,   x_0,   v = a eps - s x_0,   velocity u = a' x_0 + s' eps,   score = -eps / s.
3. Each of them with (1) is a linear system in (x_0, eps), and is solved in closed form:
       eps:       x_0 = (x_t - s eps) / a
       x_0:       eps = (x_t - a x_0) / s
       v:         x_0 = (a x_t - s v) / (a^2 + s^2),   eps = (s x_t + a v) / (a^2 + s^2)
       velocity:  x_0 = (s' x_t - s u) / d,            eps = (a u - a' x_t) / d,      d = a s' - a' s > 0
       score:     eps = -s score, then as eps.
4. A jump u -> t, u < t, has alpha_tu = alpha_t / alpha_u and sigma2_tu = sigma_t^2 - alpha_tu^2 sigma_u^2, so by Bayes
       q(x_u | x_t, x_0) = N( alpha_tu sigma_u^2 / sigma_t^2 x_t + alpha_u sigma2_tu / sigma_t^2 x_0,
                              sigma2_tu sigma_u^2 / sigma_t^2 ).
   With u the next kept index this is respaced DDPM sampling; no respaced tables are needed.
5. Learned range: log variance = f log sigma2_tu + (1 - f) log(clipped posterior variance), f = (logit + 1) / 2.
6. Its loss: KL(q(x_u | x_t, x_0) || N(mean, variance)) in bits per dimension with the mean held fixed; at index 0 the
   negative log-likelihood of x_0 under the Gaussian discretised to bins of half-width 1/255.

Sources: Ho et al. 2020 (1, 4), Salimans & Ho 2022 (v), Ma et al. 2024 (velocity), Nichol & Dhariwal 2021 (5, 6).
"""

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption.schedules import FLOOR, Schedule, as_time
from src.interfaces import PARAMETERIZATIONS, Estimate, Noised, Prediction

VARIANCES = ("fixed_small", "fixed_large", "learned_range")


def expand(t: ArrayLike, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Times of shape [], [B], [B, 1] or [B, N] with ones appended, so that they broadcast against x [B, N, P].

    Raises ValueError when a written axis of t is neither 1 nor as long as that of x.
    """
    t = as_time(t)
    if t.ndim > x.ndim or any(a not in (1, b) for a, b in zip(t.shape, x.shape, strict=False)):
        raise ValueError(
            f"Times of shape {t.shape} do not fit data of shape {x.shape}: give one time, one per row or one per token."
        )
    return t.reshape(t.shape + (1,) * (x.ndim - t.ndim))


class Coefficients(NamedTuple):
    """alpha, sigma and their derivatives at t, shaped to broadcast against x."""

    a: Array
    s: Array
    a_dot: Array
    s_dot: Array

    @property
    def determinant(self) -> Array:
        """d = a s' - a' s of (x_0, eps) -> (x_t, velocity), positive for every schedule that loses signal."""
        return self.a * self.s_dot - self.a_dot * self.s


def _x0_from_eps(c: Coefficients, xt: Array, eps: Array) -> Array:
    return (xt - c.s * eps) / jnp.maximum(c.a, FLOOR)  # at a = 0 x_t says nothing about x_0: stay finite


def _eps_from_x0(c: Coefficients, xt: Array, x0: Array) -> Array:
    return (xt - c.a * x0) / jnp.maximum(c.s, FLOOR)  # at s = 0 x_t says nothing about eps: stay finite


def _solve_v(c: Coefficients, xt: Array, v: Array) -> tuple[Array, Array]:
    norm = c.a**2 + c.s**2
    return (c.a * xt - c.s * v) / norm, (c.s * xt + c.a * v) / norm


def _solve_velocity(c: Coefficients, xt: Array, u: Array) -> tuple[Array, Array]:
    return (c.s_dot * xt - c.s * u) / c.determinant, (c.a * u - c.a_dot * xt) / c.determinant


# (x_0, eps) from x_t and one prediction, by parameterization
_SOLVE: dict[str, Callable[[Coefficients, Array, Array], tuple[Array, Array]]] = {
    "eps": lambda c, xt, eps: (_x0_from_eps(c, xt, eps), eps),
    "x0": lambda c, xt, x0: (x0, _eps_from_x0(c, xt, x0)),
    "v": _solve_v,
    "velocity": _solve_velocity,
    "score": lambda c, xt, score: (_x0_from_eps(c, xt, -c.s * score), -c.s * score),
}


def _express(c: Coefficients, x0: Array, eps: Array) -> dict[str, Array]:
    """All five parameterizations of the pair (x_0, eps)."""
    return {
        "eps": eps,
        "x0": x0,
        "v": c.a * eps - c.s * x0,
        "velocity": c.a_dot * x0 + c.s_dot * eps,
        "score": -eps / jnp.maximum(c.s, FLOOR),  # infinite at s = 0
    }


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """x_t = alpha x_0 + sigma eps on x [B, N, P] (any number of middle axes), times [], [B], [B, 1] or [B, N].

    parameterization   what the network's value means, one of PARAMETERIZATIONS
    variance           of the reverse step: fixed_small (posterior), fixed_large (beta) or learned_range (from logits)

    Raises ValueError for an unknown parameterization or variance.
    """

    schedule: Schedule
    parameterization: str = "eps"
    variance: str = "fixed_small"

    def __post_init__(self):
        if self.parameterization not in PARAMETERIZATIONS:
            raise ValueError(
                f"Gaussian: parameterization {self.parameterization!r} is unknown; take one of {PARAMETERIZATIONS}."
            )
        if self.variance not in VARIANCES:
            raise ValueError(f"Gaussian: variance {self.variance!r} is unknown; take one of {VARIANCES}.")

    def coefficients(self, t: ArrayLike, x: Float[Array, "..."]) -> Coefficients:
        """alpha, sigma and derivatives at t, broadcastable against x."""
        t = expand(t, x)
        return Coefficients(
            self.schedule.alpha(t), self.schedule.sigma(t), self.schedule.alpha_dot(t), self.schedule.sigma_dot(t)
        )

    def time_input(self, t: ArrayLike) -> Float[Array, "..."]:
        """What the network's timestep embedding receives, of the shape of t."""
        return self.schedule.time_input(t)

    def prior(self, key: Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """x at t = 1: N(0, I) of the given shape."""
        return jax.random.normal(key, shape)

    def corrupt(self, key: Array, x0: Float[Array, "B *N P"], t: ArrayLike) -> Noised:
        """One draw of q(x_t | x_0) with all five targets."""
        return self.mix(x0, jax.random.normal(key, x0.shape), t)

    def mix(self, x0: Float[Array, "B *N P"], eps: Float[Array, "B *N P"], t: ArrayLike) -> Noised:
        """x_t = alpha x_0 + sigma eps for a given noise; `changed` marks the tokens with t > 0."""
        c = self.coefficients(t, x0)
        changed = jnp.broadcast_to(expand(t, x0) > 0, (*x0.shape[:-1], 1))[..., 0]
        targets = {name: jnp.broadcast_to(value, x0.shape) for name, value in _express(c, x0, eps).items()}
        return Noised(xt=c.a * x0 + c.s * eps, targets=targets, changed=changed)

    def convert(self, prediction: Prediction, xt: Float[Array, "B *N P"], t: ArrayLike) -> Estimate:
        """The prediction in all five parameterizations (docstring of the module, 3); its variance is carried along.

        The given parameterization comes back unchanged. Where a system is singular (x_0 from eps at alpha = 0, eps from
        x_0 at sigma = 0) the divisor is floored, so that the answer is finite although x_t cannot determine it.
        """
        return self._estimate(self.parameterization, prediction, xt, t)

    def from_x0(
        self, x0: Float[Array, "B *N P"], estimate: Estimate, xt: Float[Array, "B *N P"], t: ArrayLike
    ) -> Estimate:
        """The estimate with its x_0 replaced (clipped, say) and the other four parameterizations made to agree."""
        return self._estimate("x0", Prediction(value=x0, variance=estimate.variance), xt, t)

    def _estimate(self, name: str, prediction: Prediction, xt: Array, t: ArrayLike) -> Estimate:
        c = self.coefficients(t, xt)
        x0, eps = _SOLVE[name](c, xt, prediction.value)
        return Estimate(**{**_express(c, x0, eps), name: prediction.value}, variance=prediction.variance)

    def posterior_moments(
        self, xt: Float[Array, "B *N P"], estimate: Estimate, t: ArrayLike, s: ArrayLike
    ) -> tuple[Float[Array, "B *N P"], Float[Array, "B *N P"]]:
        """Mean and log variance of p(x_s | x_t) for any 0 <= s <= t (docstring of the module, 4 and 5).

        A token with s = t keeps its value. Raises ValueError when the range is learned and the estimate lacks variance.
        """
        log_variance = self._log_variance(estimate.variance, expand(t, xt), expand(s, xt))
        mean = self._posterior_mean(xt, estimate.x0, t, s)
        return mean, jnp.broadcast_to(log_variance, mean.shape)

    def posterior(
        self, key: Array, xt: Float[Array, "B *N P"], estimate: Estimate, t: ArrayLike, s: ArrayLike
    ) -> Float[Array, "B *N P"]:
        """One draw of p(x_s | x_t); no noise where s = 0."""
        mean, log_variance = self.posterior_moments(xt, estimate, t, s)
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return mean + jnp.where(expand(s, xt) > 0, jnp.exp(0.5 * log_variance) * noise, 0.0)

    def _posterior_mean(self, xt: Array, x0: Array, t: ArrayLike, s: ArrayLike) -> Array:
        t, s = expand(t, xt), expand(s, xt)
        alpha_ts, variance_ts = self.schedule.jump(t, s)
        variance_t, variance_s = self.schedule.sigma(t) ** 2, self.schedule.sigma(s) ** 2
        divisor = jnp.maximum(variance_t, FLOOR**2)
        ratio = jnp.where(variance_t > 0, variance_s / divisor, 1.0)  # 0/0 for a clean token: it stays as it is
        return alpha_ts * ratio * xt + self.schedule.alpha(s) * variance_ts / divisor * x0

    def _log_variance(self, logits: Array | None, t: Array, s: Array) -> Array:
        small = self.schedule.posterior_log_variance(t, s)
        large = self.schedule.log_beta(t, s)
        if self.variance == "fixed_small":
            return small
        if self.variance == "fixed_large":
            # without a variance of its own the step to 0 takes the clipped one (Nichol & Dhariwal 2021)
            return jnp.where(s > 0, large, small)
        if logits is None:
            raise ValueError(
                "Gaussian: the variance is learned_range but the prediction has none; let the head give its logits."
            )
        fraction = (logits + 1) / 2
        return fraction * large + (1 - fraction) * small

    def vlb_term(
        self, x0: Float[Array, "B *N P"], xt: Float[Array, "B *N P"], prediction: Prediction, t: ArrayLike
    ) -> Float[Array, " B"]:
        """The term of the variational bound at t, in bits per dimension (docstring of the module, 6).

        The value is stop-gradiented, so only the variance learns from it (Nichol & Dhariwal 2021, section 3.1).
        Raises ValueError for a schedule in continuous time, whose bound has no single terms.
        """
        steps = self.schedule.discrete_steps
        if steps is None:
            raise ValueError(
                f"vlb_term needs a schedule with a table of betas, not {type(self.schedule).__name__}; "
                "take LinearBetas or CosineBetas, or weight the loss with weights.ELBO."
            )
        frozen = Prediction(value=jax.lax.stop_gradient(prediction.value), variance=prediction.variance)
        index = jnp.round(expand(t, xt) * steps) - 1
        s = jnp.maximum(index, 0) / steps
        mean, log_variance = self.posterior_moments(xt, self.convert(frozen, xt, t), t, s)
        truth = self._posterior_mean(xt, x0, t, s)
        kl = normal_kl(truth, self.schedule.posterior_log_variance(expand(t, xt), s), mean, log_variance)
        nll = -discretised_log_likelihood(x0, mean, 0.5 * log_variance)
        return jnp.where(index <= 0, nll, kl).mean(axis=range(1, xt.ndim)) / math.log(2)


def normal_kl(
    mean_1: Float[Array, "..."],
    log_variance_1: Float[Array, "..."],
    mean_2: Float[Array, "..."],
    log_variance_2: Float[Array, "..."],
) -> Float[Array, "..."]:
    """KL(N(mean_1, variance_1) || N(mean_2, variance_2)) per element, in nats."""
    gap = log_variance_1 - log_variance_2
    return 0.5 * (jnp.expm1(gap) - gap + (mean_1 - mean_2) ** 2 * jnp.exp(-log_variance_2))


def discretised_log_likelihood(
    x: Float[Array, "..."], mean: Float[Array, "..."], log_scale: Float[Array, "..."]
) -> Float[Array, "..."]:
    """log-probability of the bin x +- 1/255 under N(mean, exp(log_scale)^2), per element, in nats.

    The outermost bins (|x| > 0.999) reach to infinity. The distribution function is the tanh approximation
    (1 + tanh(sqrt(2/pi) (z + 0.044715 z^3))) / 2 and probabilities are floored at 1e-12, as published.
    """

    def cdf(z: Array) -> Array:
        return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))

    precision = jnp.exp(-log_scale)
    upper, lower = cdf(precision * (x - mean + 1 / 255)), cdf(precision * (x - mean - 1 / 255))
    mass = jnp.where(x < -0.999, upper, jnp.where(x > 0.999, 1 - lower, upper - lower))
    return jnp.log(jnp.maximum(mass, 1e-12))
