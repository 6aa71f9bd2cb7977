"""The process against its own algebra, against float64, and against the published implementation's numbers."""

import itertools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import VARIANCES, Gaussian, discretised_log_likelihood, expand, normal_kl
from src.corruption.schedules import GVP, VP, CosineBetas, Linear, LinearBetas
from src.interfaces import PARAMETERIZATIONS, Estimate, Prediction, Process

GOLDEN = Path(__file__).parents[1] / "golden" / "monoformer" / "expected.npz"
SCHEDULES = [LinearBetas(), CosineBetas(), Linear(), GVP(), VP()]
NAME = lambda value: value if isinstance(value, str) else type(value).__name__

# compiled, for speed: one program instead of many small ones
MIX, CONVERT, VLB, MOMENTS, POSTERIOR, CORRUPT = (
    jax.jit(method, static_argnums=0)
    for method in (
        Gaussian.mix,
        Gaussian.convert,
        Gaussian.vlb_term,
        Gaussian.posterior_moments,
        Gaussian.posterior,
        Gaussian.corrupt,
    )
)
LEVELS = jax.jit(lambda schedule, t: (schedule.alpha(t), schedule.sigma(t)), static_argnums=0)


def pair(shape=(5, 3, 4)):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.normal(size=shape), jnp.float32), jnp.asarray(draw.normal(size=shape), jnp.float32)


def only_x0(x0):
    """An estimate of which nothing but x0 may be read."""
    return Estimate(x0=x0, eps=None, v=None, velocity=None, score=None)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_every_parameterization_gives_all_five(schedule):
    """5 x 5 at five times at once (one per row); errors are measured in units of each target's size."""
    x0, eps = pair()
    t = jnp.array([0.05, 0.2, 0.5, 0.7, 0.9])

    @jax.jit
    def estimates():
        noised = Gaussian(schedule).mix(x0, eps, t)
        predictions = {name: Prediction(value=noised.targets[name], variance=eps) for name in PARAMETERIZATIONS}
        return noised, {name: Gaussian(schedule, name).convert(p, noised.xt, t) for name, p in predictions.items()}

    noised, found = estimates()
    for given, wanted in itertools.product(PARAMETERIZATIONS, PARAMETERIZATIONS):
        target, got = np.asarray(noised.targets[wanted]), np.asarray(getattr(found[given], wanted))
        scale = np.abs(target).max((1, 2), keepdims=True)
        np.testing.assert_allclose(got / scale, target / scale, atol=1e-4, err_msg=f"{given} -> {wanted}")
        np.testing.assert_array_equal(found[given].variance, eps)


def test_targets_are_the_definitions():
    """Linear at t = 1/4, by hand: x_t = 3/4 x0 + 1/4 eps, v = 3/4 eps - 1/4 x0, velocity = eps - x0, score = -4 eps."""
    x0, eps = pair()
    noised = MIX(Gaussian(Linear()), x0, eps, 0.25)
    np.testing.assert_allclose(noised.xt, 0.75 * x0 + 0.25 * eps, atol=1e-6)
    np.testing.assert_allclose(noised.targets["v"], 0.75 * eps - 0.25 * x0, atol=1e-6)
    np.testing.assert_allclose(noised.targets["velocity"], eps - x0, atol=1e-6)
    np.testing.assert_allclose(noised.targets["score"], -4 * eps, atol=1e-5)
    assert set(noised.targets) == set(PARAMETERIZATIONS)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_ends_are_finite_and_say_what_xt_says(schedule):
    """t = 0: x_t is x0, whatever the network says (unless it says x0). t = 1 without signal: x_t is the noise."""
    x0, says = pair()

    @jax.jit
    def at(t):
        xt = Gaussian(schedule).mix(x0, says, t).xt

        def total(value, given):
            estimate = Gaussian(schedule, given).convert(Prediction(value=value), xt, t)
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


def test_times_may_be_one_per_batch_row_or_token():
    x0, eps = pair((2, 3, 4))
    process = Gaussian(LinearBetas())
    t = np.array([[0.0, 0.1, 0.2], [0.3, 0.0, 1.0]], np.float32)
    noised = MIX(process, x0, eps, t)
    np.testing.assert_array_equal(noised.changed, t > 0)
    for b, n in itertools.product(range(2), range(3)):
        one = (slice(b, b + 1), slice(n, n + 1))
        alone = MIX(process, np.asarray(x0)[one], np.asarray(eps)[one], t[b, n])
        np.testing.assert_allclose(np.asarray(noised.xt)[one], alone.xt, rtol=1e-6)
    rows = MIX(process, x0, eps, t[:, 1])
    np.testing.assert_array_equal(rows.xt, MIX(process, x0, eps, t[:, 1:2]).xt)
    np.testing.assert_array_equal(rows.changed, [[True] * 3, [False] * 3])
    with pytest.raises(ValueError, match="do not fit"):
        expand(np.zeros(3), x0)
    drawn = CORRUPT(process, jax.random.key(1), x0, t)
    np.testing.assert_allclose(drawn.xt, MIX(process, x0, drawn.targets["eps"], t).xt, atol=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_posterior_is_bayes(schedule):
    """mean = A x_t + B x_0 and variance V must give, with q(x_t | x_0), the right joint law of (x_s, x_t) given x_0:

    E x_s = A alpha_t + B = alpha_s,  Var x_s = A^2 sigma_t^2 + V = sigma_s^2,  Cov = A sigma_t^2 = alpha_ts sigma_s^2.
    """
    process = Gaussian(schedule)
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
    process = Gaussian(LinearBetas())
    corrupt, draw = jax.random.split(jax.random.key(0))
    x0 = jnp.full((1, 40000, 1), 0.7)
    xt = CORRUPT(process, corrupt, x0, 0.3).xt
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
    moved = POSTERIOR(Gaussian(Linear()), jax.random.key(0), x, only_x0(np.zeros_like(x)), t, s)
    moved = np.asarray(moved)
    np.testing.assert_allclose(moved[:, :2], x[:, :2], atol=1e-5)
    assert np.abs(moved[:, 2] - x[:, 2]).min() > 1e-4


def test_variances_are_the_ends_of_the_learned_range():
    schedule = LinearBetas()
    x = jnp.zeros((1, 1, 3))
    t, s = 0.211, 0.159
    logits = jnp.array([[[-1.0, 1.0, 0.0]]])
    got = {
        name: np.asarray(MOMENTS(Gaussian(schedule, "eps", name), x, only_x0(x).replace(variance=logits), t, s)[1])
        for name in VARIANCES
    }
    low, high = (float(x) for x in jax.jit(lambda: (schedule.posterior_log_variance(t, s), schedule.log_beta(t, s)))())
    assert low < high - 0.1
    np.testing.assert_allclose(got["fixed_small"].ravel(), [low] * 3, rtol=1e-6)
    np.testing.assert_allclose(got["fixed_large"].ravel(), [high] * 3, rtol=1e-6)
    np.testing.assert_allclose(got["learned_range"].ravel(), [low, high, (low + high) / 2], rtol=1e-6)
    with pytest.raises(ValueError, match="learned_range but the prediction has none"):
        MOMENTS(Gaussian(schedule, "eps", "learned_range"), x, only_x0(x), t, s)


# --------------------------------------------------------------------------- the variational bound


def test_golden_xt_mse_and_vb():
    """The published code's numbers; channels stand for tokens here, which no term can tell apart."""
    golden = np.load(GOLDEN)
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    t = (golden["t"][golden["image_rows"]] + 1) / 1000
    x0, eps, output = flat(golden["x0"]), flat(golden["noise"]), flat(golden["model_output"])
    process = Gaussian(LinearBetas(), "eps", "learned_range")
    noised = MIX(process, x0, eps, t)
    prediction = Prediction(value=output[:, :4], variance=output[:, 4:])
    np.testing.assert_allclose(noised.xt, flat(golden["x_t"]), atol=1e-6)
    mse = np.square(prediction.value - noised.targets["eps"]).mean((1, 2))
    np.testing.assert_allclose(mse, golden["mse"], rtol=1e-6)
    np.testing.assert_allclose(VLB(process, x0, noised.xt, prediction, t), golden["vb"], rtol=1e-5)


def test_bins_partition_the_line():
    """The 256 bins of an 8-bit image have total probability 1, also when the mean is outside."""
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    for mean, scale in [(0.1, 0.3), (-1.2, 0.5), (0.7, 0.02)]:
        logs = jax.jit(discretised_log_likelihood)(levels, np.full(256, mean), np.full(256, math.log(scale)))
        np.testing.assert_allclose(np.exp(logs).sum(), 1, atol=1e-5)


def test_index_0_is_a_discretised_likelihood():
    """Against the error function, in bits, averaged over the row; other rows of the batch keep their KL."""
    x0, eps = pair((2, 1, 64))
    x0 = 0.3 * np.tanh(x0)
    process = Gaussian(LinearBetas(), "eps", "learned_range")
    t = jnp.array([0.001, 0.5])
    xt = MIX(process, x0, eps, t).xt
    logits = np.ones_like(x0)
    guess = 0.5 * eps
    got = VLB(process, x0, xt, Prediction(value=guess, variance=logits), t)
    z = np.asarray(x0 - CONVERT(process, Prediction(value=guess), xt, t).x0, np.float64)[0].ravel() / 0.01
    half = 1 / 255 / 0.01
    mass = [0.5 * (math.erf((v + half) / math.sqrt(2)) - math.erf((v - half) / math.sqrt(2))) for v in z]
    np.testing.assert_allclose(got[0], -np.log2(mass).mean(), rtol=5e-3)
    np.testing.assert_allclose(
        got[1], VLB(process, x0[1:], xt[1:], Prediction(guess[1:], logits[1:]), 0.5)[0], rtol=1e-5
    )


def test_bound_vanishes_at_the_truth_and_teaches_only_the_variance():
    x0, eps = pair((2, 3, 4))
    process = Gaussian(CosineBetas(), "v", "learned_range")
    t = jnp.array([0.003, 0.01])  # where the range is wide
    noised = MIX(process, x0, eps, t)
    bound = lambda value, logits: VLB(process, x0, noised.xt, Prediction(value=value, variance=logits), t)
    low = -np.ones_like(x0)
    np.testing.assert_allclose(bound(noised.targets["v"], low), [0, 0], atol=1e-6)
    by_value, by_logits = jax.jit(jax.grad(lambda *a: bound(*a).sum(), (0, 1)))(noised.targets["v"] + 0.1, low + 0.5)
    assert not np.any(by_value) and (np.abs(by_logits) > 1e-6).all()
    with pytest.raises(ValueError, match="table of betas, not Linear"):
        Gaussian(Linear()).vlb_term(x0, x0, Prediction(value=x0), 0.5)


def test_normal_kl_is_the_integral():
    x = np.linspace(-12, 12, 200001)
    density = lambda mean, log_variance: (
        np.exp(-((x - mean) ** 2) / 2 / np.exp(log_variance) - log_variance / 2) / 2.5066283
    )
    p, q = density(0.3, -0.4), density(-0.5, 0.7)
    exact = np.sum(p * np.log(p / q)) * (x[1] - x[0])
    np.testing.assert_allclose(normal_kl(*map(jnp.array, (0.3, -0.4, -0.5, 0.7))), exact, rtol=1e-5)


def test_the_contract_and_its_refusals():
    assert isinstance(Gaussian(Linear()), Process)
    assert Gaussian(Linear()).prior(jax.random.key(0), (2, 3, 4)).shape == (2, 3, 4)
    with pytest.raises(ValueError, match="'noise' is unknown"):
        Gaussian(Linear(), "noise")
    with pytest.raises(ValueError, match="'learned' is unknown"):
        Gaussian(Linear(), "eps", "learned")
