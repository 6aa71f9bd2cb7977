"""Squared error of a Gaussian process's output, and the variational bound that a learned variance is trained on.

1. mse = w(t) |value - target|^2, mean over the P numbers of a token; the target is in the process's own
   parameterization, and w is one of `weighting.py`.
2. vlb = KL(q(x_u | x_t, x_0) || N(mean, variance)) in bits per dimension, without gradient of the mean, u the index
   below t; at index 0 the negative log-likelihood of x_0 under the Gaussian discretised to bins of half-width 1/255.

Sources: Ho et al. 2020 (1), Nichol & Dhariwal 2021, section 3.1 (2).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from src.corruption.gaussian import Gaussian, expand
from src.interfaces import Corrupted
from src.objectives.losses.weighting import Constant


@dataclasses.dataclass(frozen=True, kw_only=True)
class SquaredError:
    """`mse` of each token, and `vlb` if the process learns its variance.

    weighting   (schedule, t, parameterization) -> w(t), a class of `weighting.py`
    """

    needs: ClassVar[tuple[str, ...]] = ("split", "targets")
    weighting: Callable = dataclasses.field(default_factory=Constant)

    def __call__(
        self, process: Gaussian, output: Float[Array, "*B N O"], c: Corrupted, target: Array
    ) -> dict[str, Float[Array, "*B N"]]:
        """Losses by name. Raises ValueError for a learned variance on a schedule in continuous time."""
        value, logits = process.split(output)
        weight = self.weighting(process.schedule, c.t, process.parameterization)
        error = expand(weight, value) * (value - process.targets(c)[process.parameterization]) ** 2
        losses = {"mse": error.mean(axis=-1)}
        if logits is not None:
            losses["vlb"] = bound(process, value, logits, c)
        return losses


def bound(
    process: Gaussian, value: Float[Array, "*B N P"], logits: Float[Array, "*B N P"], c: Corrupted
) -> Float[Array, "*B N"]:
    """The term of the variational bound at t, in bits per dimension (docstring of the module, 2).

    Its gradient reaches only the variance. Raises ValueError for a schedule in continuous time, whose bound is not a
    sum of terms.
    """
    steps = process.schedule.discrete_steps
    if steps is None:
        raise ValueError(
            f"A learned variance needs a schedule with a table of betas, not {type(process.schedule).__name__}; take "
            "LinearBetas or CosineBetas, or a fixed variance and the weighting ELBO."
        )
    index = jnp.round(expand(c.t, c.xt) * steps) - 1
    s = jnp.maximum(index, 0) / steps
    estimate = process.convert(jax.lax.stop_gradient(value), c.xt, c.t, logits)
    mean, log_variance = process.posterior_moments(c.xt, estimate, c.t, s)
    truth = process.posterior_mean(c.xt, c.x0, c.t, s)
    kl = normal_kl(truth, process.schedule.posterior_log_variance(expand(c.t, c.xt), s), mean, log_variance)
    nll = -discretised_log_likelihood(c.x0, mean, 0.5 * log_variance)
    return jnp.where(index <= 0, nll, kl).mean(axis=-1) / math.log(2)


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
