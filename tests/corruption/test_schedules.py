"""Tables against published numbers, derivatives against autodiff, jumps against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.schedules import GVP, VP, CosineBetas, Linear, LinearBetas

DISCRETE = [LinearBetas(), CosineBetas(), LinearBetas(steps=7, beta_start=0.1, beta_end=0.6)]
CONTINUOUS = [Linear(), GVP(), VP()]
ALL = DISCRETE + CONTINUOUS
NAME = lambda schedule: f"{type(schedule).__name__}{schedule.discrete_steps or ''}"

EXACT = {  # alpha, sigma in float64
    "Linear": lambda t: (1 - t, t),
    "GVP": lambda t: (np.cos(np.pi * t / 2), np.sin(np.pi * t / 2)),
    "VP": lambda t: (np.exp(-(t**2) / 4 * 19.9 - t / 20), np.sqrt(-np.expm1(-(t**2) / 2 * 19.9 - t / 10))),
}


@functools.partial(jax.jit, static_argnums=(0, 1))
def call(schedule, name, *times):
    """schedule.name(*times), compiled for speed."""
    return getattr(schedule, name)(*times)


def time_of(index):
    return (np.asarray(index) + 1) / 1000


def test_linear_betas_have_the_published_values():
    schedule = LinearBetas()
    abar = call(schedule, "alpha", time_of([0, 1, 499, 999])) ** 2
    np.testing.assert_allclose(abar, [0.9999, 0.9997800921, 0.0785872429, 4.0358298e-5], rtol=2e-6)
    np.testing.assert_allclose(call(schedule, "log_beta", time_of(0), 0.0), -9.21034, rtol=1e-6)
    t = time_of([0, 1])
    np.testing.assert_allclose(
        call(schedule, "posterior_log_variance", t, t - 0.001), [-9.816725, -9.816725], atol=2e-6
    )
    # N = 20 keeps 946 before 999
    np.testing.assert_allclose(np.exp(call(schedule, "log_beta", time_of(999), time_of(946))), 0.6475137, rtol=1e-6)


def test_cosine_betas_follow_the_cosine_until_they_are_cut():
    schedule = CosineBetas()
    t = np.arange(1, 990) / 1000
    level = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(call(schedule, "alpha", t) ** 2, level, rtol=5e-6)
    assert schedule.betas().max() == 0.999 and schedule.betas()[-2] < 0.999


@pytest.mark.parametrize("schedule", DISCRETE, ids=NAME)
def test_float32_tables_are_as_good_as_float64(schedule):
    """Every neighbouring jump gives back its beta, and sigma^2 does not cancel at the clean end."""
    n, betas = schedule.discrete_steps, schedule.betas()
    s, t = np.arange(n) / n, np.arange(1, n + 1) / n
    np.testing.assert_allclose(call(schedule, "log_beta", t, s), np.log(betas), atol=2e-6)
    log_abar = np.cumsum(np.log1p(-betas))
    np.testing.assert_allclose(call(schedule, "sigma", t) ** 2, -np.expm1(log_abar), rtol=2e-6)
    log_odds = log_abar - np.log(-np.expm1(log_abar))
    np.testing.assert_allclose(call(schedule, "log_snr", t), log_odds, rtol=1e-6, atol=5e-6)
    posterior = np.log(betas[1:] * -np.expm1(log_abar[:-1]) / -np.expm1(log_abar[1:]))
    np.testing.assert_allclose(call(schedule, "posterior_log_variance", t[1:], s[1:]), posterior, atol=5e-6)


@pytest.mark.parametrize("schedule", DISCRETE, ids=NAME)
def test_discrete_time_input_is_the_original_index(schedule):
    n = schedule.discrete_steps
    t = jnp.arange(1, n + 1) / n
    np.testing.assert_array_equal(call(schedule, "time_input", t), np.arange(n))
    np.testing.assert_array_equal(call(schedule, "index", t), np.arange(n))
    assert call(schedule, "time_input", 0.0) == 0 and call(schedule, "index", 0.0) == -1
    np.testing.assert_allclose(call(schedule, "time_input", 1.5 / n), 0.5, atol=1e-4)
    assert (schedule.t_min, schedule.t_max) == (1 / n, 1.0)


def test_continuous_time_input_is_scaled():
    assert Linear().time_input(0.25) == 250 and GVP(time_scale=1.0).time_input(0.25) == 0.25


@pytest.mark.parametrize("schedule", ALL, ids=NAME)
def test_derivatives_are_those_of_autodiff(schedule):
    n = schedule.discrete_steps or 20
    t = (jnp.arange(n)[:: max(1, n // 20)] + 0.37) / n  # inside the intervals, where a table has a derivative
    slope = lambda f: jax.jit(jax.vmap(jax.grad(lambda time: f(time))))(t)
    np.testing.assert_allclose(call(schedule, "alpha_dot", t), slope(schedule.alpha), rtol=2e-3, atol=1e-6)
    np.testing.assert_allclose(call(schedule, "sigma_dot", t), slope(schedule.sigma), rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("schedule", DISCRETE, ids=NAME)
def test_at_a_grid_point_the_slope_is_that_of_the_interval_below(schedule):
    n = schedule.discrete_steps
    t = jnp.arange(1, n + 1) / n
    np.testing.assert_allclose(call(schedule, "log_abar_dot", t), n * np.log1p(-schedule.betas()), rtol=1e-6)


@pytest.mark.parametrize("schedule", ALL, ids=NAME)
def test_jumps_compose(schedule):
    """r <= s <= t: alpha_tr = alpha_ts alpha_sr, sigma2_tr = sigma2_ts + alpha_ts^2 sigma2_sr; from 0: alpha, sigma."""
    for r, s, t in [(0.0, 0.31, 0.77), (0.1, 0.5, 0.9), (0.2, 0.203, 0.999), (0.4, 0.4, 0.41)]:
        (a_ts, v_ts), (a_sr, v_sr), (a_tr, v_tr) = (
            call(schedule, "jump", t, s),
            call(schedule, "jump", s, r),
            call(schedule, "jump", t, r),
        )
        np.testing.assert_allclose(a_tr, a_ts * a_sr, rtol=3e-6)
        np.testing.assert_allclose(v_tr, v_ts + a_ts**2 * v_sr, rtol=1e-5)
    alpha, variance = call(schedule, "jump", 0.77, 0.0)
    np.testing.assert_allclose(
        [alpha, variance], [call(schedule, "alpha", 0.77), call(schedule, "sigma", 0.77) ** 2], rtol=1e-6
    )


@pytest.mark.parametrize("schedule", CONTINUOUS, ids=NAME)
def test_short_jumps_do_not_cancel(schedule):
    exact = EXACT[type(schedule).__name__]
    t = np.linspace(0.05, 0.95, 19, dtype=np.float32)
    s = (t - 1 / 1024).astype(np.float32)
    (a_t, s_t), (a_s, s_s) = exact(t.astype(np.float64)), exact(s.astype(np.float64))
    np.testing.assert_allclose(call(schedule, "alpha", t), a_t, rtol=2e-6)
    np.testing.assert_allclose(call(schedule, "sigma", t), s_t, rtol=2e-6)
    alpha, variance = call(schedule, "jump", t, s)
    np.testing.assert_allclose(alpha, a_t / a_s, rtol=2e-6)
    np.testing.assert_allclose(variance, s_t**2 - (a_t / a_s) ** 2 * s_s**2, rtol=1e-5)


@pytest.mark.parametrize("schedule", ALL, ids=NAME)
def test_ends(schedule):
    assert call(schedule, "alpha", 0.0) == 1 and call(schedule, "sigma", 0.0) == 0
    t = np.linspace(0, 1, 41)
    assert np.isfinite(call(schedule, "log_snr", t)).all() and (np.diff(call(schedule, "log_snr", t)) < 0).all()
    assert np.isfinite(call(schedule, "alpha_dot", t)).all() and np.isfinite(call(schedule, "sigma_dot", t)).all()
    if isinstance(schedule, Linear | GVP):
        assert call(schedule, "alpha", 1.0) == 0 and call(schedule, "sigma", 1.0) == 1


@pytest.mark.parametrize("make", [lambda: LinearBetas(steps=1), lambda: LinearBetas(beta_end=1.0)])
def test_meaningless_tables_are_refused(make):
    with pytest.raises(ValueError, match=r"LinearBetas.*betas between 0 and 1"):
        make()
