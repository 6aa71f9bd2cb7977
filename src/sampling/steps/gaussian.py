"""Step samplers for the Gaussian process. `a`, `s` below are alpha, sigma; a step goes from t down to u.

1. Ancestral   x_u ~ p(x_u | x_t), the process's posterior (Ho et al. 2020).
2. DDIM   x_u = a_u x0 + sqrt(s_u^2 - c^2) eps + c z, c^2 = eta^2 sigma2_tu s_u^2 / s_t^2 (Song et al. 2021, eq. 12).
3. Euler, Heun dx/dt = velocity(x, t), the probability-flow ODE (Karras et al. 2022, algorithm 1; Ma et al. 2024).
4. Euler-Maruyama: for any w(t) >= 0 the reverse SDE  dx = (velocity - w/2 score) dt + sqrt(w) dW  has the marginals of
   the ODE (Ma et al. 2024, eq. 4).
5. DPM-Solver++(2M) in log-SNR: with lambda = log(a / s), h = lambda_u - lambda_t and h' the previous step,
       D = x0_t + (h / 2h') (x0_t - x0_previous),   x_u = s_u/s_t x_t + a_u (1 - e^-h) D  (Lu et al. 2022, algorithm 2).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import FLOOR, Schedule
from src.corruption.timesteps import shift_time
from src.interfaces import Denoise, Estimate, Process, PyTree, StepSampler

# --------------------------------------------------------------------------- time grids


def _kept_indices(n: int, steps: int, spacing: str) -> np.ndarray:
    """The `steps` indices out of n that a respaced process keeps, increasing."""
    if spacing == "ddim":
        strides = [i for i in range(1, n + 1) if len(range(0, n, i)) == steps]
        if not strides:
            raise ValueError(
                f"No whole stride picks {steps} of {n} times; take another step count or spacing 'uniform'."
            )
        return np.arange(0, n, strides[0])
    if steps > n:
        raise ValueError(f"{steps} sampling steps do not fit a process of {n} times; take at most {n}.")
    if steps == 1:
        return np.array([n - 1])  # the only step has to start from noise
    # the strides are added up one by one, because the official rounding depends on it
    return np.round(np.cumsum([0.0] + [(n - 1) / (steps - 1)] * (steps - 1))).astype(int)


def time_grid(
    schedule: Schedule, steps: int, *, spacing: str = "uniform", shift: float = 1.0, last_size: float | None = None
) -> Float[Array, " T"]:
    """Decreasing times [steps + 1] that end at 0.

    Discrete schedules: t = (k + 1)/n of the kept indices k. "uniform" keeps round(i (n-1)/(steps-1)), "ddim" every
    stride-th from 0 (both as in Nichol & Dhariwal's code). Continuous schedules: equal steps from t_max to 0, or, with
    `last_size`, equal steps to `last_size` and one from there to 0. `shift` moves times towards noise (SD3, eq. 23).

    Raises ValueError for steps < 1, an unknown spacing, or step counts that do not fit the table.
    """
    if steps < 1:
        raise ValueError(f"A sampler cannot take {steps} steps; give at least 1.")
    if spacing not in ("uniform", "ddim"):
        raise ValueError(f"The spacing {spacing!r} is unknown; take 'uniform' or 'ddim'.")
    n = schedule.discrete_steps
    if n is not None:
        times = (_kept_indices(n, steps, spacing)[::-1] + 1) / n
    elif last_size is not None:
        times = np.linspace(schedule.t_max, last_size, steps)
    else:
        times = np.linspace(schedule.t_max, 0.0, steps + 1)[:-1]
    return jnp.append(shift_time(jnp.asarray(times, jnp.float32), shift), 0.0)


# --------------------------------------------------------------------------- the loop


def integrate(
    sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: Float[Array, "B *N P"], times: Array
) -> Float[Array, "B *N P"]:
    """x at the last of the decreasing `times` [T + 1], from x at the first; step i gets the key folded with i."""
    xt = xt.astype(jnp.promote_types(xt.dtype, jnp.float32))

    def body(carry: tuple[Array, PyTree], now: tuple[Array, Array, Array]) -> tuple[tuple[Array, PyTree], None]:
        i, t, s = now
        return sampler.step(process, jax.random.fold_in(key, i), denoise, carry[0], t, s, carry[1]), None

    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    return jax.lax.scan(body, (xt, sampler.init(process, xt)), steps)[0][0]


def sample(
    sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: Float[Array, "B *N P"], steps: int
) -> Float[Array, "B *N P"]:
    """x_0 from noise x_t in `steps` steps on the sampler's own time grid, as one scan."""
    return integrate(sampler, process, denoise, key, xt, sampler.times(process, steps))


# --------------------------------------------------------------------------- samplers


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sampler:
    """Options that all samplers share.

    spacing   of the kept indices of a discrete schedule, "uniform" or "ddim"
    shift     of the times towards noise, 1 = none
    clip_x0   bound on |x0| of every estimate (the other parameterizations follow), None = no clipping
    """

    spacing: str = "uniform"
    shift: float = 1.0
    clip_x0: float | None = None

    def times(self, process: Gaussian, steps: int) -> Float[Array, " T"]:
        """The common time grid (`time_grid`)."""
        return time_grid(process.schedule, steps, spacing=self.spacing, shift=self.shift)

    def init(self, process: Gaussian, xt: Array) -> PyTree:
        """No state."""
        return ()

    def estimate(self, process: Gaussian, denoise: Denoise, xt: Array, t: Array) -> Estimate:
        """The denoiser's estimate at (x_t, t), clipped if asked."""
        estimate = denoise(xt, t)
        if self.clip_x0 is None:
            return estimate
        return process.from_x0(jnp.clip(estimate.x0, -self.clip_x0, self.clip_x0), estimate, xt, t)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ancestral(_Sampler):
    """Draws from the process's posterior; on a discrete schedule this is (respaced) DDPM sampling."""

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """x_s ~ p(x_s | x_t)."""
        return process.posterior(key, xt, self.estimate(process, denoise, xt, t), t, s), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DDIM(_Sampler):
    """Deterministic for eta = 0, DDPM with fixed_small variance for eta = 1."""

    eta: float = 0.0

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """One step of equation 2."""
        schedule, estimate = process.schedule, self.estimate(process, denoise, xt, t)
        sigma_s = schedule.sigma(s)
        clean = schedule.alpha(s) * estimate.x0
        if self.eta == 0:
            return clean + sigma_s * estimate.eps, state
        variance = self.eta**2 * schedule.jump(t, s)[1] * (sigma_s / schedule.sigma(t)) ** 2
        kept = jnp.sqrt(jnp.maximum(sigma_s**2 - variance, 0.0))  # rounding may go below 0
        noise = jax.random.normal(key, xt.shape, xt.dtype)
        return clean + kept * estimate.eps + jnp.sqrt(variance) * noise, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Euler(_Sampler):
    """First-order ODE steps, one evaluation each."""

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) velocity."""
        return xt + (s - t) * self.estimate(process, denoise, xt, t).velocity, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class Heun(_Sampler):
    """Second-order ODE steps, two evaluations each; the step to t = 0, where velocities may be singular, is Euler's."""

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) (velocity at x_t + velocity at Euler's x_s) / 2."""
        first = self.estimate(process, denoise, xt, t).velocity
        euler = xt + (s - t) * first

        def corrected() -> Array:
            return xt + (s - t) * 0.5 * (first + self.estimate(process, denoise, euler, s).velocity)

        return jax.lax.cond(s > 0, corrected, lambda: euler), state


def _forward_diffusion(schedule: Schedule, t: Array) -> Array:
    """g^2 / 2 of the forward SDE whose marginals the process has: s s' - (a'/a) s^2."""
    a, s = jnp.maximum(schedule.alpha(t), FLOOR), schedule.sigma(t)
    return s * schedule.sigma_dot(t) - schedule.alpha_dot(t) / a * s**2


# w(t) / 2 by form, as in SiT's code (its time runs the other way)
DIFFUSIONS: dict[str, Callable[[Schedule, Array], Any]] = {
    "sigma": lambda schedule, t: schedule.sigma(t),
    "constant": lambda schedule, t: jnp.ones_like(t),
    "linear": lambda schedule, t: t,
    "decreasing": lambda schedule, t: 0.25 * (1 - jnp.cos(jnp.pi * t)) ** 2,
    "increasing-decreasing": lambda schedule, t: jnp.sin(jnp.pi * t) ** 2,
    "forward": _forward_diffusion,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class EulerMaruyama(_Sampler):
    """First-order steps of the reverse SDE with w(t) = 2 scale DIFFUSIONS[diffusion](t); scale = 0 is Euler's ODE.

    diffusion   form of w; the law of the samples does not depend on it, only the error of finite steps does
    last        how the step to t = 0 goes: "mean" (the SDE without its noise) or "ode"
    last_size   length of that step in continuous time (SiT: 0.04), None = as long as the others

    Raises ValueError for an unknown form or last step.
    """

    diffusion: str = "sigma"
    scale: float = 1.0
    last: str = "mean"
    last_size: float | None = None

    def __post_init__(self):
        if self.diffusion not in DIFFUSIONS:
            raise ValueError(
                f"EulerMaruyama: diffusion {self.diffusion!r} is unknown; take one of {tuple(DIFFUSIONS)}."
            )
        if self.last not in ("mean", "ode"):
            raise ValueError(f"EulerMaruyama: last step {self.last!r} is unknown; take 'mean' or 'ode'.")

    def times(self, process: Gaussian, steps: int) -> Float[Array, " T"]:
        """The common time grid with a last step of its own length."""
        return time_grid(process.schedule, steps, spacing=self.spacing, shift=self.shift, last_size=self.last_size)

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """x_s = x_t + (s - t) (velocity - w/2 score) + sqrt(w (t - s)) z, without z at s = 0."""
        estimate = self.estimate(process, denoise, xt, t)
        half_w = self.scale * DIFFUSIONS[self.diffusion](process.schedule, t)
        half_w = jnp.where(s > 0, half_w, half_w if self.last == "mean" else 0.0)
        noise = jnp.where(s > 0, jnp.sqrt(2 * half_w * (t - s)), 0.0) * jax.random.normal(key, xt.shape, xt.dtype)
        return xt + (s - t) * (estimate.velocity - half_w * estimate.score) + noise, state


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPMSolverPP2M(_Sampler):
    """Second-order multistep solver on x0 estimates, one evaluation a step; first order at the start and to t = 0."""

    def init(self, process: Gaussian, xt: Array) -> PyTree:
        """(previous x0, previous lambda, whether there was a previous step)."""
        return jnp.zeros_like(xt), jnp.zeros(()), jnp.zeros((), bool)

    def step(
        self, process: Gaussian, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]:
        """One step of equation 5."""
        schedule = process.schedule
        x0 = self.estimate(process, denoise, xt, t).x0
        before, lambda_before, has_before = state
        lambda_t, lambda_s = 0.5 * schedule.log_snr(t), 0.5 * schedule.log_snr(s)
        ratio = (lambda_s - lambda_t) / jnp.where(has_before, lambda_t - lambda_before, 1.0)
        blended = x0 + jnp.where(has_before & (s > 0), 0.5 * ratio, 0.0) * (x0 - before)
        shrink = schedule.sigma(s) / schedule.sigma(t)  # a_u e^-h = a_t s_u / s_t stays finite where lambda does not
        xs = shrink * xt + (schedule.alpha(s) - schedule.alpha(t) * shrink) * blended
        return xs, (x0, lambda_t, jnp.ones((), bool))
