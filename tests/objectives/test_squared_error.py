"""The squared error and the variational bound, by hand, in float64 and against published numbers."""

import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import CosineBetas, Linear, LinearBetas
from src.interfaces import Corrupted, FieldSpec
from src.objectives.losses.squared_error import SquaredError, discretised_log_likelihood, normal_kl
from src.objectives.losses.weighting import Constant, MinSNR

GOLDEN = Path(__file__).parents[1] / "golden" / "monoformer" / "expected.npz"
CORRUPT = jax.jit(Gaussian.corrupt, static_argnums=0)
LOSS = jax.jit(SquaredError.__call__, static_argnums=(0, 1))


def make(schedule, parameterization, variance="fixed_small", features=4):
    spec = FieldSpec((3,), features=features)
    return Gaussian(field=spec, schedule=schedule, parameterization=parameterization, variance=variance)


def pair(shape):
    draw = np.random.default_rng(0)
    return jnp.asarray(draw.normal(size=shape), jnp.float32), jnp.asarray(draw.normal(size=shape), jnp.float32)


def vlb(process, output, c):
    return LOSS(SquaredError(), process, output, c, c.x0)["vlb"]


def test_golden_xt_mse_and_vb():
    """The published code's numbers; channels stand for tokens here, which no term can tell apart."""
    golden = np.load(GOLDEN)
    flat = lambda x: x.reshape(*x.shape[:2], -1)
    t = (golden["t"][golden["image_rows"]] + 1) / 1000
    x0, eps, output = flat(golden["x0"]), flat(golden["noise"]), flat(golden["model_output"])
    process = make(LinearBetas(), "eps", "learned_range", features=x0.shape[-1])
    c = CORRUPT(process, x0, eps, t)
    np.testing.assert_allclose(c.xt, flat(golden["x_t"]), atol=1e-6)
    losses = LOSS(SquaredError(), process, np.concatenate([output[:, :4], output[:, 4:]], axis=-1), c, x0)
    assert set(losses) == {"mse", "vlb"}
    np.testing.assert_allclose(losses["mse"].mean(1), golden["mse"], rtol=1e-6)
    np.testing.assert_allclose(losses["vlb"].mean(1), golden["vb"], rtol=1e-5)


def test_bins_partition_the_line():
    """The 256 bins of an 8-bit image have total probability 1, also when the mean is outside."""
    levels = np.arange(256, dtype=np.float32) / 127.5 - 1
    for mean, scale in [(0.1, 0.3), (-1.2, 0.5), (0.7, 0.02)]:
        logs = jax.jit(discretised_log_likelihood)(levels, np.full(256, mean), np.full(256, math.log(scale)))
        np.testing.assert_allclose(np.exp(logs).sum(), 1, atol=1e-5)


def test_index_0_is_a_discretised_likelihood():
    """Against the error function, in bits, averaged over the row; other rows of the batch keep their KL."""
    x0, eps = pair((2, 1, 64))
    x0 = 0.3 * jnp.tanh(x0)
    process = make(LinearBetas(), "eps", "learned_range", features=64)
    t = jnp.array([0.001, 0.5])
    c = CORRUPT(process, x0, eps, t)
    guess = 0.5 * eps
    output = jnp.concatenate([guess, jnp.ones_like(x0)], axis=-1)
    got = vlb(process, output, c)
    z = np.asarray(x0 - process.estimate(output, c.xt, t).x0, np.float64)[0].ravel() / 0.01
    half = 1 / 255 / 0.01
    mass = [0.5 * (math.erf((v + half) / math.sqrt(2)) - math.erf((v - half) / math.sqrt(2))) for v in z]
    np.testing.assert_allclose(got[0, 0], -np.log2(mass).mean(), rtol=5e-3)
    alone = Corrupted(x0=x0[1:], xt=c.xt[1:], t=0.5, noise=eps[1:])
    np.testing.assert_allclose(got[1], vlb(process, output[1:], alone)[0], rtol=1e-5)


def test_bound_vanishes_at_the_truth_and_teaches_only_the_variance():
    x0, eps = pair((2, 3, 4))
    process = make(CosineBetas(), "v", "learned_range")
    t = jnp.array([[0.003], [0.01]])  # where the range is wide
    c = CORRUPT(process, x0, eps, t)
    truth, low = process.targets(c)["v"], -jnp.ones_like(x0)
    bound = lambda value, logits: vlb(process, jnp.concatenate([value, logits], axis=-1), c)
    np.testing.assert_allclose(bound(truth, low), np.zeros((2, 3)), atol=1e-6)
    by_value, by_logits = jax.jit(jax.grad(lambda *a: bound(*a).sum(), (0, 1)))(truth + 0.1, low + 0.5)
    assert not np.any(by_value) and (np.abs(by_logits) > 1e-6).all()
    with pytest.raises(ValueError, match="table of betas, not Linear"):
        SquaredError()(make(Linear(), "v", "learned_range"), jnp.zeros((2, 3, 8)), c, x0)


def test_error_is_weighted_by_the_time_of_each_token():
    """In the process's own parameterization, mean over the numbers of a token; a clean token counts as t = 0."""
    x0, eps = pair((2, 3, 4))
    process = make(Linear(), "v")
    t = jnp.array([[0.0, 0.1, 0.2], [0.3, 0.5, 1.0]])
    c = CORRUPT(process, x0, eps, t)
    said = jnp.cos(x0)
    target = (1 - t)[..., None] * eps - t[..., None] * x0
    expected = np.mean((said - target) ** 2, axis=-1)
    for law in (Constant(value=2.0), MinSNR(gamma=3.0)):
        losses = LOSS(SquaredError(weighting=law), process, said, c, x0)
        assert set(losses) == {"mse"}
        np.testing.assert_allclose(losses["mse"], law(process.schedule, t, "v") * expected, rtol=1e-5)


def test_normal_kl_is_the_integral():
    x = np.linspace(-12, 12, 200001)
    density = lambda mean, log_variance: (
        np.exp(-((x - mean) ** 2) / 2 / np.exp(log_variance) - log_variance / 2) / 2.5066283
    )
    p, q = density(0.3, -0.4), density(-0.5, 0.7)
    exact = np.sum(p * np.log(p / q)) * (x[1] - x[0])
    np.testing.assert_allclose(normal_kl(*map(jnp.array, (0.3, -0.4, -0.5, 0.7))), exact, rtol=1e-5)
