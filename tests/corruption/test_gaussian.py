"""The process against its own algebra, against float64, and against the published implementation's numbers."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import PARAMETERIZATIONS, VARIANCES, Estimate, Gaussian, expand
from src.corruption.schedules import GVP, VP, CosineBetas, Linear, LinearBetas
from src.interfaces import FieldSpec, Process

SCHEDULES = [LinearBetas(), CosineBetas(), Linear(), GVP(), VP()]
NAME = lambda value: value if isinstance(value, str) else type(value).__name__

# compiled, for speed: one program instead of many small ones
CORRUPT, MOMENTS, POSTERIOR = (
    jax.jit(method, static_argnums=0) for method in (Gaussian.corrupt, Gaussian.posterior_moments, Gaussian.posterior)
)
LEVELS = jax.jit(lambda schedule, t: (schedule.alpha(t), schedule.sigma(t)), static_argnums=0)


def make(schedule, *options, features=4, **more):
    """A process of so many numbers per token; options: parameterization, variance."""
    options = dict(zip(("parameterization", "variance"), options, strict=False)) | more
    return Gaussian(field=FieldSpec((3,), features=features), schedule=schedule, **options)


def pair(shape=(5, 3, 4)):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.normal(size=shape), jnp.float32), jnp.asarray(draw.normal(size=shape), jnp.float32)


def only_x0(x0):
    """An estimate of which nothing but x0 may be read."""
    return Estimate(x0=x0, eps=None, v=None, velocity=None, score=None)


STEEP = [LinearBetas(beta_end=end) for end in (0.3, 0.35, 0.4, 0.6, 0.9, 0.999)]
STEEP += [LinearBetas(steps=20000), VP(beta_max=1000.0), VP(beta_min=0.0), CosineBetas(max_beta=1 - 1e-12)]


@pytest.mark.parametrize(
    "schedule, parameterization",
    [
        *((schedule, "velocity") for schedule in STEEP),
        *((LinearBetas(beta_end=0.6), name) for name in PARAMETERIZATIONS),
    ],
    ids=repr,
)
def test_estimates_are_finite_where_alpha_or_its_slope_is_zero_in_float32(schedule, parameterization):
    """At pure noise, where the velocity of a steep schedule is 0 and says nothing, eps is x_t; at t = 0, x0 is x_t."""
    process = make(schedule, parameterization)
    x0, eps = pair((11, 3, 4))
    t = jnp.linspace(0, 1, 11)

    c = process.corrupt(x0, eps, t)
    xt, exact = c.xt, process.estimate(process.targets(c)[parameterization], c.xt, t)
    zero = process.estimate(jnp.zeros_like(x0), xt, t)
    for estimate in (exact, zero):
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(estimate))
    np.testing.assert_allclose(exact.x0[0], xt[0], atol=1e-4)
    alpha = np.asarray(schedule.alpha(t))
    for row in np.flatnonzero(alpha < 1e-8):  # nothing of x0 is left
        np.testing.assert_allclose(exact.eps[row], xt[row], atol=1e-4)
        np.testing.assert_allclose(exact.score[row], -xt[row], atol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_every_parameterization_gives_all_five(schedule):
    """5 x 5 at five times at once (one per row); errors are measured in units of each target's size."""
    x0, eps = pair()
    t = jnp.array([0.05, 0.2, 0.5, 0.7, 0.9])

    @jax.jit
    def estimates():
        c = make(schedule).corrupt(x0, eps, t)
        targets = make(schedule).targets(c)
        outputs = {name: jnp.concatenate([targets[name], eps], axis=-1) for name in PARAMETERIZATIONS}
        learned = {name: make(schedule, name, "learned_range") for name in PARAMETERIZATIONS}
        return targets, {name: learned[name].estimate(output, c.xt, t) for name, output in outputs.items()}

    targets, found = estimates()
    for given, wanted in itertools.product(PARAMETERIZATIONS, PARAMETERIZATIONS):
        target, got = np.asarray(targets[wanted]), np.asarray(getattr(found[given], wanted))
        scale = np.abs(target).max((1, 2), keepdims=True)
        np.testing.assert_allclose(got / scale, target / scale, atol=1e-4, err_msg=f"{given} -> {wanted}")
        np.testing.assert_array_equal(found[given].variance, eps)


def test_targets_are_the_definitions():
    """Linear at t = 1/4, by hand: x_t = 3/4 x0 + 1/4 eps, v = 3/4 eps - 1/4 x0, velocity = eps - x0, score = -4 eps."""
    x0, eps = pair()
    process = make(Linear())
    c = CORRUPT(process, x0, eps, 0.25)
    np.testing.assert_allclose(c.xt, 0.75 * x0 + 0.25 * eps, atol=1e-6)
    targets = process.targets(c)
    np.testing.assert_allclose(targets["v"], 0.75 * eps - 0.25 * x0, atol=1e-6)
    np.testing.assert_allclose(targets["velocity"], eps - x0, atol=1e-6)
    np.testing.assert_allclose(targets["score"], -4 * eps, atol=1e-5)
    assert set(targets) == set(PARAMETERIZATIONS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_ends_are_finite_and_say_what_xt_says(schedule):
    """t = 0: x_t is x0, whatever the network says (unless it says x0). t = 1 without signal: x_t is the noise."""
    x0, says = pair()

    @jax.jit
    def at(t):
        xt = make(schedule).corrupt(x0, says, t).xt

        def total(value, given):
            estimate = make(schedule, given).estimate(value, xt, t)
            return sum(jnp.tanh(x).sum() for x in jax.tree.leaves(estimate)), estimate

        return xt, {name: jax.grad(total, has_aux=True)(says, name) for name in PARAMETERIZATIONS}

    for t, given in itertools.product((0.0, 1.0), PARAMETERIZATIONS):
        xt, found = at(t)
        estimate = found[given][1]
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found[given]))
        if t == 0 and given != "x0":
            np.testing.assert_allclose(estimate.x0, xt, atol=2e-6)
        if t == 1 and given in ("x0", "v", "velocity") and isinstance(schedule, Linear | GVP):
            np.testing.assert_allclose(estimate.eps, xt, atol=2e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_times_may_be_one_per_batch_row_or_token(schedule):
    x0, eps = pair((2, 3, 4))
    x0 = x0.at[0, 0, 0].set(-0.0)
    process = make(schedule)
    t = np.array([[0.0, 0.1, 0.2], [0.3, 0.0, 1.0]], np.float32)
    xt = CORRUPT(process, x0, eps, t).xt
    for b, n in itertools.product(range(2), range(3)):
        one = (slice(b, b + 1), slice(n, n + 1))
        alone = CORRUPT(process, x0[one], eps[one], t[b, n])
        np.testing.assert_allclose(xt[one], alone.xt, rtol=1e-6)
    same = np.asarray(xt).view(np.int32) == np.asarray(x0).view(np.int32)
    np.testing.assert_array_equal(same.all(axis=-1), t == 0)  # clean tokens bit for bit
    np.testing.assert_array_equal(CORRUPT(process, x0, eps, t[:, 1]).xt, CORRUPT(process, x0, eps, t[:, 1:2]).xt)
    with pytest.raises(ValueError, match="do not fit"):
        expand(np.zeros(3), x0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_posterior_is_bayes(schedule):
    """mean = A x_t + B x_0 and variance V must give, with q(x_t | x_0), the right joint law of (x_s, x_t) given x_0:

    E x_s = A alpha_t + B = alpha_s,  Var x_s = A^2 sigma_t^2 + V = sigma_s^2,  Cov = A sigma_t^2 = alpha_ts sigma_s^2.
    """
    process = make(schedule, features=1)
    t = jnp.array([0.9, 0.9, 0.5, 0.2, 0.002, 0.7])
    s = jnp.array([0.1, 0.899, 0.4, 0.001, 0.001, 0.0])
    one, zero = np.ones((6, 1, 1), np.float32), np.zeros((6, 1, 1), np.float32)
    a, log_variance = MOMENTS(process, one, only_x0(zero), t, s)
    b, _ = MOMENTS(process, zero, only_x0(one), t, s)
    a, b = np.ravel(a), np.ravel(b)
    variance = np.where(np.asarray(s) > 0, np.exp(np.ravel(log_variance)), 0)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = (np.asarray(LEVELS(schedule, time)) for time in (t, s))
    np.testing.assert_allclose(a * alpha_t + b, alpha_s, rtol=1e-5)
    np.testing.assert_allclose(a**2 * sigma_t**2 + variance, sigma_s**2, rtol=1e-5)
    np.testing.assert_allclose(a * sigma_t**2, alpha_t / alpha_s * sigma_s**2, rtol=1e-5)
    np.testing.assert_allclose((a[-1], b[-1]), (0, 1), atol=1e-6)


def test_posterior_draws_with_the_true_x0_follow_q():
    """x_t -> x_s drawn with x_0 known has the law of q(x_s | x_0); at s = 0 the draw is x_0 itself."""
    process = make(LinearBetas(), features=1)
    corrupt, draw = jax.random.split(jax.random.key(0))
    x0 = jnp.full((1, 40000, 1), 0.7)
    xt = CORRUPT(process, x0, process.noise(corrupt, (1, 40000)), 0.3).xt
    xs = POSTERIOR(process, draw, xt, only_x0(x0), 0.3, 0.2)
    alpha, sigma = np.asarray(LEVELS(process.schedule, 0.2))
    xs = np.asarray(xs)
    assert abs(xs.mean() - 0.7 * alpha) < 4 * sigma / 200
    assert abs(xs.std() / sigma - 1) < 4 / math.sqrt(2 * 40000)
    np.testing.assert_allclose(POSTERIOR(process, jax.random.key(3), xt, only_x0(x0), 0.3, 0.0), x0, atol=1e-6)


def test_a_token_whose_time_stays_keeps_its_value():
    """Per-token steps (diffusion forcing): clean and waiting tokens are not touched while others move."""
    x, _ = pair((1, 3, 4))
    t, s = jnp.array([[0.0, 0.4, 0.4]]), jnp.array([[0.0, 0.4, 0.2]])
    moved = POSTERIOR(make(Linear()), jax.random.key(0), x, only_x0(np.zeros_like(x)), t, s)
    moved = np.asarray(moved)
    np.testing.assert_allclose(moved[:, :2], x[:, :2], atol=1e-5)
    assert np.abs(moved[:, 2] - x[:, 2]).min() > 1e-4


def test_variances_are_the_ends_of_the_learned_range():
    schedule = LinearBetas()
    x = jnp.zeros((1, 1, 3))
    t, s = 0.211, 0.159
    logits = jnp.array([[[-1.0, 1.0, 0.0]]])
    got = {
        name: np.asarray(
            MOMENTS(make(schedule, "eps", name, features=3), x, only_x0(x).replace(variance=logits), t, s)[1]
        )
        for name in VARIANCES
    }
    low, high = (float(x) for x in jax.jit(lambda: (schedule.posterior_log_variance(t, s), schedule.log_beta(t, s)))())
    assert low < high - 0.1
    np.testing.assert_allclose(got["fixed_small"].ravel(), [low] * 3, rtol=1e-6)
    np.testing.assert_allclose(got["fixed_large"].ravel(), [high] * 3, rtol=1e-6)
    np.testing.assert_allclose(got["learned_range"].ravel(), [low, high, (low + high) / 2], rtol=1e-6)
    with pytest.raises(ValueError, match="learned_range, but the estimate has none"):
        MOMENTS(make(schedule, "eps", "learned_range", features=3), x, only_x0(x), t, s)


def test_the_contract_and_its_refusals():
    process = make(Linear(), "v")
    assert isinstance(process, Process)
    assert process.inputs == process.field and (process.outputs, process.guided) == (4, 4)
    learned = make(LinearBetas(), variance="learned_range")
    assert (learned.outputs, learned.guided) == (8, 4)
    x0, eps = pair((2, 3, 4))
    np.testing.assert_array_equal(
        process.noise(jax.random.key(0), (2, 3)), jax.random.normal(jax.random.key(0), (2, 3, 4))
    )
    assert process.prior(jax.random.key(0), (2, 3)).shape == (2, 3, 4)
    value, time = process.network(x0, jnp.array([[0.25], [0.5]]))
    np.testing.assert_array_equal(value, x0)
    np.testing.assert_array_equal(time, [[250], [500]])
    estimate = process.estimate(eps, x0, jnp.array([[0.25], [0.5]]))
    np.testing.assert_array_equal(process.hint(estimate), estimate.x0)
    np.testing.assert_allclose(process.times(2), [0.999, 0.4995, 0], rtol=1e-6)
    assert process.state() is None and process.bind(None) is process
    with pytest.raises(ValueError, match="8 numbers per token instead of 4"):
        process.estimate(jnp.zeros((2, 3, 8)), x0, 0.5)
    with pytest.raises(ValueError, match="'noise' is unknown"):
        make(Linear(), "noise")
    with pytest.raises(ValueError, match="'learned' is unknown"):
        make(Linear(), "eps", "learned")
    with pytest.raises(ValueError, match="vocab=7"):
        Gaussian(field=FieldSpec((3,), vocab=7), schedule=Linear())
