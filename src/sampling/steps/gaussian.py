"""Step samplers for the Gaussian process. `a`, `s` below are alpha, sigma; a step goes from t down to u.

1. DDPM   x_u ~ p(x_u | x_t), the process's posterior (Ho et al. 2020).
2. DDIM   x_u = a_u x0 + sqrt(s_u^2 - c^2) eps + c z, c^2 = eta^2 sigma2_tu s_u^2 / s_t^2 (Song et al. 2021, eq. 12).
3. Euler, Heun dx/dt = velocity(x, t), the probability-flow ODE (Karras et al. 2022, algorithm 1; Ma et al. 2024).
4. Euler-Maruyama: for any w(t) >= 0 the reverse SDE  dx = (velocity - w/2 score) dt + sqrt(w) dW  has the marginals of
   the ODE (Ma et al. 2024, eq. 4).
5. DPM-Solver++(2M), see `corruption/_solvers.py` (Lu et al. 2022, algorithm 2).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from src.corruption._grids import time_grid
from src.corruption._solvers import ddim, dpm_solver_2m, no_history
from src.corruption.gaussian import Estimate, Gaussian, expand
from src.corruption.schedules import FLOOR, Schedule
from src.corruption.timesteps import check_sway, sway_time
from src.interfaces import PyTree
from src.sampling.steps.base import StepBase

Again = Callable[[Array, Array], Estimate]  # (x_t, t) -> one more estimate


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampler(StepBase):
    """Options of all samplers, beside `shift`.

    spacing   of the kept indices of a discrete schedule: uniform, ddim or linspace
    sway      of the times, behind the shift: below 0 steps are smaller near noise (`timesteps.py`); 0: none
    clip_x0   bound on |x0| of every estimate; the other parameterizations are converted from it; None: no clipping
    """

    spacing: str = "uniform"
    sway: float = 0.0
    clip_x0: float | None = None

    def __post_init__(self):
        check_sway(self.sway)

    def times(self, process: Gaussian, steps: int) -> Float[Array, " T"]:
        """`time_grid` of the schedule, with sway."""
        return sway_time(time_grid(process.schedule, steps, spacing=self.spacing, shift=self.shift), self.sway)

    def clipped(self, process: Gaussian, estimate: Estimate, xt: Array, t: Array) -> Estimate:
        """The estimate with x0 clipped to `clip_x0`."""
        if self.clip_x0 is None:
            return estimate
        return process.from_x0(jnp.clip(estimate.x0, -self.clip_x0, self.clip_x0), estimate, xt, t)

    def step(
        self,
        process: Gaussian,
        key: Array,
        estimate: Estimate,
        xt: Array,
        t: Array,
        s: Array,
        state: PyTree,
        again: Again,
    ) -> tuple[Array, PyTree]:
        """x_s from the clipped estimate; times [], [B, 1] or [B, N]."""
        estimate = self.clipped(process, estimate, xt, t)

        def evaluate(x: Array, time: Array) -> Estimate:
            return self.clipped(process, again(x, time), x, time)

        return self.move(process, key, estimate, xt, t, s, state, evaluate)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDPM(_Sampler):
    """Draws from the process's posterior: (respaced) DDPM sampling on a discrete schedule. `ancestral.py` is the same
    for any process, without `spacing` and `clip_x0`."""

    def move(
        self, process: Gaussian, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, state: PyTree, _: Again
    ) -> tuple[Array, PyTree]:
        """x_s ~ p(x_s | x_t)."""
        return process.posterior(key, xt, estimate, t, s), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(_Sampler):
    """Deterministic for eta = 0, DDPM with fixed_small variance for eta = 1."""

    eta: float = 0.0

    def move(
        self, process: Gaussian, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, state: PyTree, _: Again
    ) -> tuple[Array, PyTree]:
        """One step of equation 2."""
        schedule = process.schedule
        if self.eta == 0:
            return ddim(schedule, estimate, xt, s), state
        t, s = expand(t, xt), expand(s, xt)
        sigma_s = schedule.sigma(s)
        clean = schedule.alpha(s) * estimate.x0
        variance = self.eta**2 * schedule.jump(t, s)[1] * (sigma_s / jnp.maximum(schedule.sigma(t), FLOOR)) ** 2
        kept = jnp.sqrt(jnp.maximum(sigma_s**2 - variance, 0.0))  # rounding may go below 0
        noise = jax.random.normal(key, xt.shape, xt.dtype)
        return clean + kept * estimate.eps + jnp.sqrt(variance) * noise, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(_Sampler):
    """First-order ODE steps, one evaluation each."""

    def move(
        self, process: Gaussian, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, state: PyTree, _: Again
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) velocity."""
        return xt + (expand(s, xt) - expand(t, xt)) * estimate.velocity, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(_Sampler):
    """Second-order ODE steps, two evaluations each; the step to t = 0, where velocities may be singular, is Euler's."""

    def move(
        self,
        process: Gaussian,
        key: Array,
        estimate: Estimate,
        xt: Array,
        t: Array,
        s: Array,
        state: PyTree,
        again: Again,
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) (velocity at x_t + velocity at Euler's x_s) / 2."""
        time, s = s, expand(s, xt)
        length = s - expand(t, xt)
        euler = xt + length * estimate.velocity

        def corrected() -> Array:
            second = again(euler, time).velocity
            return jnp.where(s > 0, xt + length * 0.5 * (estimate.velocity + second), euler)

        return jax.lax.cond((s > 0).any(), corrected, lambda: euler), state


def _forward_diffusion(schedule: Schedule, t: Array, most: Array) -> Array:
    """g^2 / 2 of the forward SDE with the process's marginals: s s' - (a'/a) s^2, with -a'/a at most `most`."""
    a, s = jnp.maximum(schedule.alpha(t), FLOOR), schedule.sigma(t)
    return s * schedule.sigma_dot(t) + jnp.minimum(-schedule.alpha_dot(t) / a, most) * s**2


# w(t) / 2 by form, as in SiT's code, whose time is 1 - t; `most` bounds what is infinite at alpha = 0
DIFFUSIONS: dict[str, Callable[[Schedule, Array, Array], Any]] = {
    "sigma": lambda schedule, t, most: schedule.sigma(t),
    "constant": lambda schedule, t, most: jnp.ones_like(t),
    "linear": lambda schedule, t, most: t,
    "decreasing": lambda schedule, t, most: 0.25 * (1 - jnp.cos(jnp.pi * t)) ** 2,
    "increasing-decreasing": lambda schedule, t, most: jnp.sin(jnp.pi * t) ** 2,
    "forward": _forward_diffusion,
}
MOST_REPLACED = 0.25  # share of the noise of x_t that a step of "forward" may replace at alpha = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama(_Sampler):
    """First-order steps of the reverse SDE with w(t) = 2 scale DIFFUSIONS[diffusion](t); scale = 0 is Euler's ODE.

    diffusion   form of w; it changes only the discretization error, not the distribution of exact samples. That of
                "forward" is infinite at alpha = 0 and bounded there, so that a step of any length is stable
    last        step to t = 0: "mean" (the SDE without noise) or "ode"
    last_size   length of that step in continuous time (SiT: 0.04); None: as long as the others

    Raises ValueError for an unknown form or last step.
    """

    diffusion: str = "sigma"
    scale: float = 1.0
    last: str = "mean"
    last_size: float | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.diffusion not in DIFFUSIONS:
            raise ValueError(
                f"EulerMaruyama: diffusion {self.diffusion!r} is unknown; take one of {tuple(DIFFUSIONS)}."
            )
        if self.last not in ("mean", "ode"):
            raise ValueError(f"EulerMaruyama: last step {self.last!r} is unknown; take 'mean' or 'ode'.")

    def times(self, process: Gaussian, steps: int) -> Float[Array, " T"]:
        """`time_grid` of the schedule with `last_size`."""
        times = time_grid(process.schedule, steps, spacing=self.spacing, shift=self.shift, last_size=self.last_size)
        return sway_time(times, self.sway)

    def move(
        self, process: Gaussian, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, state: PyTree, _: Again
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) (velocity - w/2 score) + sqrt(w (t - s)) z, without z at s = 0."""
        t, s = expand(t, xt), expand(s, xt)
        most = MOST_REPLACED / jnp.maximum(self.scale * (t - s), FLOOR)
        half_w = self.scale * DIFFUSIONS[self.diffusion](process.schedule, t, most)
        half_w = jnp.where(s > 0, half_w, half_w if self.last == "mean" else 0.0)
        noise = jnp.where(s > 0, jnp.sqrt(2 * half_w * (t - s)), 0.0) * jax.random.normal(key, xt.shape, xt.dtype)
        return xt + (s - t) * (estimate.velocity - half_w * estimate.score) + noise, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(_Sampler):
    """Second-order multistep solver on x0 estimates, one evaluation a step; first order at the start and to t = 0."""

    def init(self, process: Gaussian, xt: Array) -> PyTree:
        """The history of a first step."""
        return no_history(xt)

    def move(
        self, process: Gaussian, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, state: PyTree, _: Again
    ) -> tuple[Array, PyTree]:
        """One step (`corruption/_solvers.py`, 2)."""
        return dpm_solver_2m(process.schedule, estimate.x0, xt, t, s, state)
