"""Five parameterizations of a prediction from x_t = a x_0 + s eps, with a = alpha(t), s = sigma(t):

       eps,   x_0,   v = a eps - s x_0,   velocity u = a' x_0 + s' eps,   score = -eps / s.

Each of them and x_t are a linear system in (x_0, eps) with a closed-form solution:

       eps:       x_0 = (x_t - s eps) / a
       x_0:       eps = (x_t - a x_0) / s
       v:         x_0 = (a x_t - s v) / (a^2 + s^2),   eps = (s x_t + a v) / (a^2 + s^2)
       velocity:  x_0 = (s' x_t - s u) / d,            eps = (a u - a' x_t) / d,      d = a s' - a' s > 0
       score:     eps = -s score, then as eps.

Sources: Ho et al. 2020 (eps), Salimans & Ho 2022 (v), Ma et al. 2024 (velocity).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import struct
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.corruption.base import expand
from src.corruption.schedules import FLOOR, Schedule

PARAMETERIZATIONS = ("eps", "x0", "v", "velocity", "score")


@struct.dataclass
class Estimate:
    """One prediction in every parameterization, [B, N, P] each; `variance`: raw logits of a learned variance."""

    x0: Any
    eps: Any
    v: Any
    velocity: Any
    score: Any
    variance: Any = None


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


def coefficients(schedule: Schedule, t: ArrayLike, x: Float[Array, "..."]) -> Coefficients:
    """alpha, sigma and derivatives at t, broadcastable against x."""
    t = expand(t, x)
    return Coefficients(schedule.alpha(t), schedule.sigma(t), schedule.alpha_dot(t), schedule.sigma_dot(t))


def _x0_from_eps(c: Coefficients, xt: Array, eps: Array) -> Array:
    return (xt - c.s * eps) / jnp.maximum(c.a, FLOOR)  # finite at a = 0, where x_t does not determine x_0


def _eps_from_x0(c: Coefficients, xt: Array, x0: Array) -> Array:
    return (xt - c.a * x0) / jnp.maximum(c.s, FLOOR)  # finite at s = 0, where x_t does not determine eps


def _solve_v(c: Coefficients, xt: Array, v: Array) -> tuple[Array, Array]:
    norm = c.a**2 + c.s**2
    return (c.a * xt - c.s * v) / norm, (c.s * xt + c.a * v) / norm


def _solve_velocity(c: Coefficients, xt: Array, u: Array) -> tuple[Array, Array]:
    divisor = jnp.maximum(c.determinant, FLOOR)
    x0, eps = (c.s_dot * xt - c.s * u) / divisor, (c.a * u - c.a_dot * xt) / divisor
    # where u says nothing (d = 0), the larger part of x_t follows from x_t itself and the smaller one
    clean = c.a > c.s
    x0_there = jnp.where(clean, (xt - c.s * eps) / jnp.maximum(c.a, FLOOR), x0)
    eps_there = jnp.where(clean, eps, (xt - c.a * x0) / jnp.maximum(c.s, FLOOR))
    singular = c.determinant < FLOOR
    return jnp.where(singular, x0_there, x0), jnp.where(singular, eps_there, eps)


# (x_0, eps) from x_t and one prediction, by parameterization
_SOLVE: dict[str, Callable[[Coefficients, Array, Array], tuple[Array, Array]]] = {
    "eps": lambda c, xt, eps: (_x0_from_eps(c, xt, eps), eps),
    "x0": lambda c, xt, x0: (x0, _eps_from_x0(c, xt, x0)),
    "v": _solve_v,
    "velocity": _solve_velocity,
    "score": lambda c, xt, score: (_x0_from_eps(c, xt, -c.s * score), -c.s * score),
}


def express(c: Coefficients, x0: Float[Array, "..."], eps: Float[Array, "..."]) -> dict[str, Array]:
    """All five parameterizations of the pair (x_0, eps), each of the shape of x_0."""
    found = {
        "eps": eps,
        "x0": x0,
        "v": c.a * eps - c.s * x0,
        "velocity": c.a_dot * x0 + c.s_dot * eps,
        "score": -eps / jnp.maximum(c.s, FLOOR),  # infinite at s = 0
    }
    return {name: jnp.broadcast_to(value, x0.shape) for name, value in found.items()}


def convert(
    c: Coefficients, name: str, value: Float[Array, "..."], xt: Float[Array, "..."], variance: Array | None
) -> Estimate:
    """`value`, in the parameterization `name`, converted to all five; the given one is returned unchanged.

    Where the system is singular (x_0 from eps at alpha = 0, eps from x_0 at sigma = 0, a velocity where d rounds to 0
    because alpha is too small for float32), the divisor is floored, so that the result is finite.
    """
    x0, eps = _SOLVE[name](c, xt, value)
    return Estimate(**{**express(c, x0, eps), name: value}, variance=variance)
