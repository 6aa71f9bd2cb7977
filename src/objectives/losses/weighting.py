"""Loss weights: `(schedule, t, parameterization) -> weight` of the squared error, of the shape of t.

1. For a given x_t, all five errors are multiples of the error in x_0. With a = alpha, s = sigma, d = a s' - a' s:
       |d eps| = a/s |d x_0|,  |d v| = (a^2 + s^2)/s |d x_0|,  |d velocity| = d/s |d x_0|,  |d score| = a/s^2 |d x_0|.
2. So a weight w of the squared x_0 error is the weight w / J^2 of another one, with J the factor above.
3. The weights below are defined for x_0 and converted, in logarithms because of extreme values at both ends of t.

Sources: Hang et al. 2023 (Min-SNR), Kingma et al. 2021 (ELBO), Salimans & Ho 2022 (v), Li et al. 2024 (`on`).
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption._parameterizations import PARAMETERIZATIONS
from src.corruption.schedules import FLOOR, Schedule, as_time


def _logs(schedule: Schedule, t: ArrayLike) -> tuple[Array, Array, Array]:
    """log alpha, log sigma, log d, floored at the singular ends."""
    a, s = schedule.alpha(t), schedule.sigma(t)
    d = a * schedule.sigma_dot(t) - schedule.alpha_dot(t) * s
    return jnp.log(jnp.maximum(a, FLOOR)), jnp.log(jnp.maximum(s, FLOOR)), jnp.log(jnp.maximum(d, FLOOR))


def log_factor(schedule: Schedule, t: ArrayLike, parameterization: str) -> Float[Array, "..."]:
    """log J, J = error in this parameterization / error in x_0 (docstring of the module, 1).

    Raises ValueError for an unknown parameterization.
    """
    log_a, log_s, log_d = _logs(schedule, t)
    factors = {
        "x0": jnp.zeros_like(log_s),
        "eps": log_a - log_s,
        "v": jnp.log(schedule.alpha(t) ** 2 + schedule.sigma(t) ** 2) - log_s,
        "velocity": log_d - log_s,
        "score": log_a - 2 * log_s,
    }
    if parameterization not in factors:
        raise ValueError(f"The parameterization {parameterization!r} is unknown; take one of {PARAMETERIZATIONS}.")
    return factors[parameterization]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant:
    """The same weight at all times: of the network's own parameterization (the "simple" loss of Ho et al. 2020), or of
    another one, `on` ("x0" with a network that gives the velocity is the loss of Li et al. 2024 "D-DiT")."""

    value: float = 1.0
    on: str = ""

    def __call__(self, schedule: Schedule, t: ArrayLike, parameterization: str) -> Float[Array, "..."]:
        """`value`, in the shape of t; with `on` converted. Raises ValueError for an unknown parameterization."""
        if not self.on:
            return jnp.full_like(as_time(t), self.value)
        factor = log_factor(schedule, t, self.on) - log_factor(schedule, t, parameterization)
        return self.value * jnp.exp(2 * factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MinSNR:
    """min(SNR, gamma) on x_0; so min(1, gamma / SNR) on eps and min(SNR, gamma) / (SNR + 1) on v (Hang et al. 2023)."""

    gamma: float = 5.0

    def __call__(self, schedule: Schedule, t: ArrayLike, parameterization: str) -> Float[Array, "..."]:
        """The weight in the given parameterization."""
        on_x0 = jnp.minimum(schedule.log_snr(t), jnp.log(self.gamma))
        return jnp.exp(on_x0 - 2 * log_factor(schedule, t, parameterization))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBO:
    """-1/2 d SNR/dt on x_0 = a d / s^3: the continuous-time variational bound in nats (Kingma et al. 2021, eq. 17)."""

    def __call__(self, schedule: Schedule, t: ArrayLike, parameterization: str) -> Float[Array, "..."]:
        """The weight in the given parameterization."""
        log_a, log_s, log_d = _logs(schedule, t)
        return jnp.exp(log_a + log_d - 3 * log_s - 2 * log_factor(schedule, t, parameterization))
