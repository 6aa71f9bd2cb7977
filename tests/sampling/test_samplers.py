"""Samplers on Gaussian data N(MU, SD^2), where the denoiser, the marginals and the ODE's flow are known exactly:

E[x0 | x_t] = MU + K (x_t - a MU), K = a SD^2 / (a^2 SD^2 + s^2);   q(x_t) = N(a MU, a^2 SD^2 + s^2);
the flow of the ODE keeps (x_t - a MU) / sqrt(a^2 SD^2 + s^2).
"""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sit_xl2_imagenet256
from src.common.lookup import build
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import GVP, VP, CosineBetas, Linear, LinearBetas
from src.interfaces import FieldSpec, StepSampler
from src.sampling.loop import integrate, sample
from src.sampling.steps import ancestral
from src.sampling.steps.gaussian import (
    DDIM,
    DDPM,
    DIFFUSIONS,
    DPMSolverPP2M,
    Euler,
    EulerMaruyama,
    Heun,
    time_grid,
)

MU, SD = 0.6, 0.5
NAME = lambda value: value if isinstance(value, str) else type(value).__name__


def make(schedule, parameterization="x0"):
    return Gaussian(field=FieldSpec((5,), features=1), schedule=schedule, parameterization=parameterization)


def width(schedule, t):
    return jnp.sqrt(schedule.alpha(t) ** 2 * SD**2 + schedule.sigma(t) ** 2)


def exact(process, xt, t):
    a = process.schedule.alpha(t)
    gain = a * SD**2 / width(process.schedule, t) ** 2
    return process.estimate(MU + gain * (xt - a * MU), xt, t)


@functools.partial(jax.jit, static_argnums=0)
def flow(schedule, x, t, s):
    level = (x - schedule.alpha(t) * MU) / width(schedule, t)
    return schedule.alpha(s) * MU + level * width(schedule, s)


@functools.partial(jax.jit, static_argnums=(0, 1))
def run(sampler, schedule, key, x, times):
    process = make(schedule)
    return integrate(sampler, process, lambda xt, t: exact(process, xt, t), key, x, times)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def run_all(sampler, schedule, key, x, steps):
    process = make(schedule)
    return sample(sampler, process, lambda xt, t: exact(process, xt, t), key, x, steps)


X = jnp.linspace(-2, 2, 5).reshape(1, 5, 1)
COUNTS = np.array([20, 80])

# --------------------------------------------------------------------------- times


def indices(steps, spacing="uniform"):
    times = np.asarray(time_grid(LinearBetas(), steps, spacing=spacing))
    assert times[-1] == 0 and len(times) == steps + 1
    return np.round(times[-2::-1] * 1000 - 1).astype(int).tolist()


def test_discrete_grids_are_the_published_ones():
    published = "0 53 105 158 210 263 315 368 421 473 526 578 631 684 736 789 841 894 946 999"
    assert indices(20) == [int(k) for k in published.split()]
    assert indices(50, "ddim") == list(range(0, 1000, 20))
    assert indices(1000) == list(range(1000)) and indices(1) == [999]


def test_continuous_grids():
    np.testing.assert_allclose(time_grid(Linear(t_max=1.0), 4), [1, 0.75, 0.5, 0.25, 0], atol=1e-6)
    np.testing.assert_allclose(time_grid(Linear(t_max=1.0), 4, shift=3.0), [1, 0.9, 0.75, 0.5, 0], atol=1e-6)
    times = EulerMaruyama(last_size=0.04).times(make(Linear(t_max=1.0)), 4)
    np.testing.assert_allclose(times, [1, 0.68, 0.36, 0.04, 0], atol=1e-6)


def published_sit(steps, last_size):
    """SiT's times of Euler-Maruyama: `steps` equally spaced ones from 0 (noise) to 1 - last_size, then 1; ours are
    1 minus those."""
    return 1 - np.append(np.linspace(0, 1 - last_size, steps), 1.0)


@pytest.mark.parametrize("steps", [250, 50])
def test_official_sit_has_the_published_times(steps):
    config = sit_xl2_imagenet256.get_config("official").fields.image
    schedule = build("corruption", config.process.schedule)
    sde, ode = build("sampling/steps", config.step), Euler()
    np.testing.assert_allclose(sde.times(make(schedule), steps), published_sit(steps, 0.04), atol=1e-6)
    np.testing.assert_allclose(ode.times(make(schedule), steps), 1 - np.arange(steps + 1) / steps, atol=1e-6)
    assert schedule.t_max == 1 and dataclasses.asdict(sde) | {"shift": 1.0} == dataclasses.asdict(
        EulerMaruyama(diffusion="sigma", scale=1.0, last="mean", last_size=0.04)
    )


def test_impossible_grids_are_refused():
    for steps, spacing, words in [(1001, "uniform", "at most 1000"), (51, "ddim", "No integer stride")]:
        with pytest.raises(ValueError, match=words):
            time_grid(LinearBetas(), steps, spacing=spacing)
    with pytest.raises(ValueError, match="at least 1"):
        time_grid(Linear(), 0)
    with pytest.raises(ValueError, match="'cosine' is unknown"):
        time_grid(Linear(), 5, spacing="cosine")


# --------------------------------------------------------------------------- deterministic samplers

ORDERS = [(Euler(), 1), (DDIM(), 1), (Heun(), 2), (DPMSolverPP2M(), 2)]


def slopes(errors):
    return np.log2(errors[:-1] / errors[1:])


@pytest.mark.parametrize("schedule", [Linear(), VP()], ids=NAME)
@pytest.mark.parametrize("sampler, order", ORDERS, ids=["Euler", "DDIM", "Heun", "DPMSolverPP2M"])
def test_order_of_convergence(schedule, sampler, order):
    """The error against the exact flow from t = 0.8 to 0.2 falls as steps^-order, on a grid that is not uniform."""
    truth = flow(schedule, X, 0.8, 0.2)
    errors = []
    for n in COUNTS:
        times = 0.8 * (0.2 / 0.8) ** (jnp.arange(n + 1) / n)
        errors.append(float(jnp.abs(run(sampler, schedule, jax.random.key(0), X, times) - truth).max()))
    slope = np.polyfit(np.log(COUNTS), -np.log(errors), 1)[0]
    assert order - 0.2 < slope < order + 0.3, (slope, errors)


@pytest.mark.parametrize("schedule", [LinearBetas(), CosineBetas(), Linear(), GVP(), VP()], ids=NAME)
@pytest.mark.parametrize("sampler", [Euler(), DDIM(), Heun(), DPMSolverPP2M()], ids=NAME)
def test_whole_runs_reach_the_data(schedule, sampler):
    """From t_max to 0 on the sampler's own grid, singular ends included: the map from noise to data is the flow."""
    got = run_all(sampler, schedule, jax.random.key(0), X, 100)
    np.testing.assert_allclose(got, flow(schedule, X, schedule.t_max, 0.0), atol=0.05)


# --------------------------------------------------------------------------- stochastic samplers


@functools.partial(jax.jit, static_argnums=(0, 1))
def starts(schedule, n):
    x = jax.random.normal(jax.random.key(5), (1, n, 1))
    return schedule.alpha(schedule.t_max) * MU + width(schedule, schedule.t_max) * x


def draws(sampler, schedule, steps, n):
    return np.asarray(run_all(sampler, schedule, jax.random.key(6), starts(schedule, n), steps))


def ddpm_law(steps):
    """Mean and variance of DDPM samples, carried in float64 through the respaced tables of the textbook."""
    kept = np.round(np.arange(steps) * 999 / (steps - 1)).astype(int)
    abar = np.cumprod(1 - LinearBetas().betas())[kept]
    before = np.append(1.0, abar[:-1])
    beta = 1 - abar / before
    mean, variance = math.sqrt(abar[-1]) * MU, abar[-1] * SD**2 + 1 - abar[-1]
    for k in range(steps)[::-1]:
        gain = math.sqrt(abar[k]) * SD**2 / (abar[k] * SD**2 + 1 - abar[k])
        on_x0 = math.sqrt(before[k]) * beta[k] / (1 - abar[k])
        slope = math.sqrt(1 - beta[k]) * (1 - before[k]) / (1 - abar[k]) + on_x0 * gain
        mean = slope * mean + on_x0 * (1 - gain * math.sqrt(abar[k])) * MU
        variance = slope**2 * variance + beta[k] * (1 - before[k]) / (1 - abar[k])
    return mean, variance


@pytest.mark.parametrize("sampler", [DDPM(), ancestral.Ancestral(), DDIM(eta=1.0)], ids=repr)
def test_respaced_ddpm_has_the_law_of_the_textbook(sampler):
    n, (mean, variance) = 60000, ddpm_law(20)
    x = draws(sampler, LinearBetas(), 20, n)
    assert abs(x.mean() - mean) < 4 * math.sqrt(variance / n)
    assert abs(x.var() / variance - 1) < 4 * math.sqrt(2 / n)


def test_ddpm_law_tends_to_the_data_at_first_order():
    """That law (checked above to be the sampler's) misses Var x0, which it draws as a point, by O(1 / steps)."""
    gaps = np.array([SD**2 - ddpm_law(n)[1] for n in (50, 100, 200)])
    assert (gaps > 0).all() and (np.abs(slopes(gaps) - 1) < 0.25).all() and gaps[-1] < 0.02


@pytest.mark.parametrize("schedule", [LinearBetas(), VP()], ids=NAME)
def test_ddim_with_eta_1_is_ancestral(schedule):
    """The same draw, not only the same law."""
    x = jax.random.normal(jax.random.key(1), (1, 7, 1))
    a, b = (run_all(s, schedule, jax.random.key(2), x, 8) for s in (DDPM(), DDIM(eta=1.0)))
    np.testing.assert_allclose(a, b, atol=2e-5)


@functools.cache
def ode_draws(n):
    return draws(EulerMaruyama(scale=0.0), GVP(), 200, n)


@pytest.mark.parametrize("diffusion", DIFFUSIONS)
def test_law_of_sde_samples_does_not_depend_on_w(diffusion):
    """Six forms of w(t): always the data's mean and variance, up to O(1 / steps) and Monte-Carlo error."""
    n = 20000
    x = draws(EulerMaruyama(diffusion=diffusion, last_size=0.002), GVP(), 200, n)
    assert abs(x.mean() - MU) < 0.01 + 4 * SD / math.sqrt(n)
    assert abs(x.std() / SD - 1) < 0.02 + 4 / math.sqrt(2 * n)
    ode = ode_draws(n)
    assert np.abs(x - ode).mean() > 0.1  # the noise is really there: the same starts end elsewhere


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def run_velocity(sampler, schedule, key, x, steps):
    """The network gives the exact velocity, as a network of SiT does."""
    process = make(schedule, "velocity")
    velocity = lambda xt, t: exact(make(schedule), xt, t).velocity
    return sample(sampler, process, lambda xt, t: process.estimate(velocity(xt, t), xt, t), key, x, steps)


@pytest.mark.parametrize("sampler", [EulerMaruyama(last_size=0.04), Euler()], ids=NAME)
def test_official_sit_draws_the_data(sampler):
    """From x = N(0, 1) at t = 1: each start of the ODE ends where Euler's steps from there end in float64, and the SDE
    has the law."""
    schedule = build("corruption", sit_xl2_imagenet256.get_config("official").fields.image.process.schedule)
    n = 5000
    start = jax.random.normal(jax.random.key(5), (1, n, 1))
    x = np.asarray(run_velocity(sampler, schedule, jax.random.key(6), start, 250))
    if isinstance(sampler, Euler):
        truth, times = np.asarray(start, np.float64), 1 - np.arange(251) / 250
        for t, s in itertools.pairwise(times):
            gain = (t - (1 - t) * SD**2) / ((1 - t) ** 2 * SD**2 + t**2)  # E[eps - x0 | x_t] = gain (x_t - a MU) - MU
            truth += (s - t) * (gain * (truth - (1 - t) * MU) - MU)
        np.testing.assert_allclose(x, truth, atol=2e-5)
    assert abs(x.mean() - MU) < 0.002 + 4 * SD / math.sqrt(n)
    assert abs(x.std() / SD - 1) < 0.01 + 4 / math.sqrt(2 * n)


@pytest.mark.parametrize("schedule, steps", [(Linear(t_max=1.0), 20), (Linear(t_max=1.0), 100), (GVP(t_max=1.0), 20)])
def test_forward_diffusion_from_pure_noise_draws_the_data(schedule, steps):
    """Its w is infinite at alpha = 0, where the samples start; they have the data's law up to O(1 / steps)."""
    n = 5000
    sampler = EulerMaruyama(diffusion="forward", last_size=0.2 / steps)
    start = jax.random.normal(jax.random.key(5), (1, n, 1))
    x = np.asarray(run_velocity(sampler, schedule, jax.random.key(6), start, steps))
    assert abs(x.mean() - MU) < 0.4 / steps + 4 * SD / math.sqrt(n)
    assert abs(x.std() / SD - 1) < 0.8 / steps + 4 / math.sqrt(2 * n)


@pytest.mark.parametrize("beta_end", [0.4, 0.9])
def test_velocities_of_steep_betas_draw_the_data(beta_end):
    """alpha is 0 in float32 over a part of the times, and the samples pass through them."""
    n, schedule = 5000, LinearBetas(beta_end=beta_end)
    start = jax.random.normal(jax.random.key(5), (1, n, 1))
    x = np.asarray(run_velocity(DDIM(), schedule, jax.random.key(6), start, 500))
    assert schedule.alpha(1.0) == 0
    np.testing.assert_allclose(x, MU + SD * start, atol=0.1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def one_step(sampler, schedule, x, t, s):
    process = make(schedule)
    return sampler.step(process, jax.random.key(1), exact(process, x, t), x, t, s, (), exact)[0]


@pytest.mark.parametrize("scale", [1.0, 2.0])
@pytest.mark.parametrize("schedule", [Linear(t_max=1.0), CosineBetas()], ids=NAME)
def test_one_step_of_forward_diffusion_is_stable_at_the_noisy_end(schedule, scale):
    """However long it is, x keeps the scale of its marginal."""
    sampler = EulerMaruyama(diffusion="forward", scale=scale)
    t, x = jnp.array(schedule.t_max), starts(schedule, 20000)
    for length in (0.002, 0.05, 0.1):
        moved = one_step(sampler, schedule, x, t, t - length)
        assert 0.8 < moved.std() / width(schedule, t) < 1.1


def test_last_sde_step():
    """To t = 0 without noise: by the drift of the SDE, or by that of the ODE."""
    process = make(Linear())
    estimate = exact(process, X, 0.1)
    t, s = jnp.array(0.1), jnp.array(0.0)
    step = lambda last: EulerMaruyama(last=last).step(process, jax.random.key(0), estimate, X, t, s, (), exact)[0]
    np.testing.assert_allclose(step("ode"), X - 0.1 * estimate.velocity, atol=1e-6)
    np.testing.assert_allclose(step("mean"), X - 0.1 * (estimate.velocity - 0.1 * estimate.score), atol=1e-6)


# --------------------------------------------------------------------------- times of rows and tokens

EVERY = [DDPM(), DDIM(), DDIM(eta=0.5), Euler(), Heun(), EulerMaruyama(), DPMSolverPP2M()]


@pytest.mark.parametrize("sampler", EVERY, ids=lambda sampler: f"{NAME(sampler)}{getattr(sampler, 'eta', '')}")
def test_times_may_be_one_per_row_or_token(sampler):
    """A step of each token at its own time is the step of the whole at that time; clean tokens stay finite."""
    process = make(Linear())
    x = jnp.concatenate([X, -X])
    t, s = jnp.array([[0.9] * 5, [0.4] * 5]), jnp.array([[0.7] * 5, [0.0] * 5])

    @jax.jit
    def move(t, s):
        again = lambda x, t: exact(process, x, t[..., None] if jnp.ndim(t) else t)
        return sampler.step(process, jax.random.key(0), again(x, t), x, t, s, sampler.init(process, x), again)[0]

    rows, tokens = move(t[:, :1], s[:, :1]), move(t, s)
    np.testing.assert_allclose(rows, tokens, atol=1e-6)
    for row in range(2):
        np.testing.assert_allclose(rows[row], move(t[row, 0], s[row, 0])[row], atol=1e-5)
    assert np.isfinite(move(t.at[0, 1].set(0.0), s.at[0, 1].set(0.0))).all()


# --------------------------------------------------------------------------- options


def test_clipping_bounds_x0_and_keeps_the_estimate_consistent():
    process = make(LinearBetas())
    estimate = DDIM(clip_x0=0.5).clipped(process, exact(process, 3 * X, 0.4), 3 * X, jnp.array(0.4))
    assert jnp.abs(estimate.x0).max() == 0.5
    a, s = process.schedule.alpha(0.4), process.schedule.sigma(0.4)
    np.testing.assert_allclose(a * estimate.x0 + s * estimate.eps, 3 * X, atol=1e-5)


def test_contract_and_refusals():
    for sampler in (DDPM(), ancestral.Ancestral(), DDIM(), Euler(), Heun(), EulerMaruyama(), DPMSolverPP2M()):
        assert isinstance(sampler, StepSampler)
    with pytest.raises(ValueError, match="'brownian' is unknown"):
        EulerMaruyama(diffusion="brownian")
    with pytest.raises(ValueError, match="'tweedie' is unknown"):
        EulerMaruyama(last="tweedie")
