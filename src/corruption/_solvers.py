"""One step of a solver of the probability-flow ODE, from an estimate at t to x at s < t; a = alpha, s = sigma.

1. DDIM   x_s = a_s x0 + s_s eps (Song et al. 2021, eq. 12 without noise); Euler's method where alpha, sigma are linear.
2. DPM-Solver++(2M) in log-SNR: with lambda = log(a / s), h = lambda_s - lambda_t and h' the previous step,
       D = x0_t + (h / 2h') (x0_t - x0_previous),   x_s = s_s/s_t x_t + a_s (1 - e^-h) D  (Lu et al. 2022, algorithm 2).
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from src.corruption._parameterizations import Estimate
from src.corruption.base import expand
from src.corruption.schedules import FLOOR, Schedule


class History(NamedTuple):
    """The step before, of DPM-Solver++(2M): its x0 and lambda of each token, and whether there was one."""

    x0: Float[Array, "*B N P"]
    log_ratio: Float[Array, "*B N 1"]
    exists: Bool[Array, ""]


def no_history(xt: Float[Array, "*B N P"]) -> History:
    """That of the first step."""
    return History(jnp.zeros_like(xt), jnp.zeros_like(xt[..., :1]), jnp.zeros((), bool))


def ddim(schedule: Schedule, estimate: Estimate, xt: Float[Array, "*B N P"], s: ArrayLike) -> Float[Array, "*B N P"]:
    """x_s of equation 1, [*B, N, P]; times of `expand`."""
    s = expand(s, xt)
    return schedule.alpha(s) * estimate.x0 + schedule.sigma(s) * estimate.eps


def dpm_solver_2m(
    schedule: Schedule,
    x0: Float[Array, "*B N P"],
    xt: Float[Array, "*B N P"],
    t: ArrayLike,
    s: ArrayLike,
    last: History,
) -> tuple[Float[Array, "*B N P"], History]:
    """x_s of equation 2, and the history of the next step; of first order without a history, and to s = 0."""
    t, s = expand(t, xt), expand(s, xt)
    lambda_t, lambda_s = 0.5 * schedule.log_snr(t), 0.5 * schedule.log_snr(s)
    ratio = (lambda_s - lambda_t) / jnp.where(last.exists, lambda_t - last.log_ratio, 1.0)
    blended = x0 + jnp.where(last.exists & (s > 0), 0.5 * ratio, 0.0) * (x0 - last.x0)
    # a_s e^-h = a_t s_s / s_t stays finite where lambda does not
    shrink = schedule.sigma(s) / jnp.maximum(schedule.sigma(t), FLOOR)
    xs = shrink * xt + (schedule.alpha(s) - schedule.alpha(t) * shrink) * blended
    return xs, History(x0, jnp.broadcast_to(lambda_t, last.log_ratio.shape), jnp.ones((), bool))
