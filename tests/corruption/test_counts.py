"""The counts process against enumeration in float64 and against published numbers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.counts import Counts, quantile
from src.interfaces import FieldSpec, Process
from tests.helpers.family import golden
from tests.helpers.programs import compiled

V = 7
FIELD = FieldSpec((4,), vocab=V, features=3)
PROCESS = Counts(field=FIELD)
POSTERIOR = jax.jit(Counts.posterior, static_argnums=0)
SHARES, CHANCES = compiled(PROCESS.keep_probability), compiled(PROCESS.birth_probability)
QUANTILE = jax.jit(quantile, static_argnames="most")


def binomial(n, p):
    """[V] in float64."""
    return np.array([math.comb(n, k) * p**k * (1 - p) ** (n - k) if k <= n else 0.0 for k in range(V)])


def test_corruption_is_binomial():
    """The quantiles of an even grid of uniforms have the shares of the law, for every x_0 and several times."""
    n = 10_000
    u = jnp.broadcast_to(((jnp.arange(n) + 0.5) / n)[:, None], (n, V))
    x0 = jnp.broadcast_to(jnp.arange(V), (n, V))
    for t in (0.3, 0.48, 0.5, 0.54, 1.0):
        kept, lost = SHARES(jnp.float32(t))
        xt = np.asarray(QUANTILE(u, x0, kept, lost, most=V - 1))
        for count in range(V):
            shares = np.bincount(xt[:, count], minlength=V) / n
            np.testing.assert_allclose(shares, binomial(count, float(kept)), atol=1.5 / n)
        assert (np.diff(xt, axis=0) >= 0).all()


def test_clean_counts_come_back_bit_for_bit():
    x0 = jnp.asarray(np.random.default_rng(0).integers(0, V, size=(2, 4, 3)))
    t = jnp.array([[0.0, 0.5, 0.0, 1.0], [0.2, 0.0, 0.7, 0.0]])
    for u in (PROCESS.noise(jax.random.key(0), (2, 4)), jnp.zeros((2, 4, 3)), jnp.full((2, 4, 3), 1 - 2**-24)):
        c = compiled(PROCESS.corrupt)(x0, u, t)
        np.testing.assert_array_equal(np.asarray(c.xt)[t == 0], np.asarray(x0)[t == 0])
        assert (np.asarray(c.xt) <= np.asarray(x0)).all() and (c.xt >= 0).all() and c.xt.dtype == x0.dtype
    np.testing.assert_array_equal(PROCESS.prior(jax.random.key(1), (2, 4)), np.zeros((2, 4, 3)))


def test_shares_are_the_published_times():
    """logit p equally spaced between the ends; 1 - p keeps its precision, and p is 1 exactly at 0."""
    process = Counts(field=FIELD, steps=50)
    t = jnp.arange(1, 51) / 50
    kept, lost = (np.asarray(x, np.float64) for x in process.keep_probability(t))
    np.testing.assert_allclose([lost[0], kept[-1]], math.exp(-15), rtol=5e-6)
    np.testing.assert_allclose(np.diff(np.log(kept / lost)), -2 * math.log(math.expm1(15)) / 49, rtol=1e-4)
    assert tuple(process.keep_probability(0.0)) == (1, 0)
    np.testing.assert_allclose(process.keep_probability(0.01)[1], math.exp(-15) / 2, rtol=1e-6)
    arrays = golden("blackout/grid_and_weights")
    known = Counts(field=FIELD)
    t = jnp.asarray((arrays["index"] + 1) / 1000, jnp.float32)
    kept, lost = known.keep_probability(t)
    np.testing.assert_allclose(kept, arrays["survival_f64"], rtol=2e-5)
    np.testing.assert_allclose(lost, -np.expm1(-arrays["time_f64"]), rtol=2e-5)
    instantaneous, finite = known.weights(t)
    # published times are 1e-12 off, which the weights of the ends show
    np.testing.assert_allclose(instantaneous, arrays["weight_instant_f64"], rtol=2e-5, atol=5e-9)
    np.testing.assert_allclose(finite / 1000, arrays["weight_finite_f64"], rtol=2e-5, atol=5e-12)


def test_births_are_bayes():
    """q(x_s | x_t, x_0) from the binomials by enumeration is x_t + Binomial(x_0 - x_t, chance)."""
    for t, s in [(0.6, 0.5), (0.5, 0.4), (0.52, 0.519), (1.0, 0.7), (0.5, 0.0)]:
        p_t, p_s = (float(SHARES(jnp.float32(time))[0]) for time in (t, s))
        chance, rest = (float(x) for x in CHANCES(jnp.float32(t), jnp.float32(s)))
        np.testing.assert_allclose(chance + rest, 1, atol=1e-6)
        for x0 in range(V):
            for xt in range(x0 + 1):
                if binomial(x0, p_t)[xt] < 1e-12:
                    continue
                joint = [binomial(x0, p_s)[xs] * binomial(xs, p_t / p_s)[xt] for xs in range(V)]
                births = binomial(x0 - xt, chance)
                expected = np.concatenate([np.zeros(xt), births])[:V]
                np.testing.assert_allclose(np.array(joint) / sum(joint), expected, atol=3e-5)


def test_posterior_with_the_true_rate_is_bayes():
    """Whole rates need no rounding: the draws have the law of q(x_s | x_t, x_0); at s = 0 they are x_0."""
    n = 20_000
    xt = jnp.broadcast_to(jnp.array([0, 2, 1]), (n, 1, 3))
    x0 = jnp.broadcast_to(jnp.array([6, 5, 1]), (n, 1, 3))
    rate = (x0 - xt).astype(jnp.float32)
    chance = float(PROCESS.birth_probability(0.55, 0.48)[0])
    for rounding in ("stochastic", "nearest"):
        process = Counts(field=FIELD, rounding=rounding)
        xs = np.asarray(POSTERIOR(process, jax.random.key(0), xt, rate, 0.55, 0.48))
        for i, (low, high) in enumerate([(0, 6), (2, 5), (1, 1)]):
            expected = np.concatenate([np.zeros(low), binomial(high - low, chance)])[:V]
            assert np.abs(np.bincount(xs[:, 0, i], minlength=V) / n - expected).max() < 0.015
        np.testing.assert_array_equal(POSTERIOR(process, jax.random.key(1), xt, rate, 0.55, 0.0), x0)


def test_rounding_keeps_the_mean_and_the_bounds():
    n = 20_000
    xt, rate = jnp.full((n, 1, 3), 4), jnp.full((n, 1, 3), jnp.array([0.3, 1.25, 9.0]))
    for rounding, means in [("stochastic", [4.3, 5.25, 6]), ("nearest", [4, 5, 6])]:
        x = np.asarray(POSTERIOR(Counts(field=FIELD, rounding=rounding), jax.random.key(0), xt, rate, 0.5, 0.0))
        np.testing.assert_allclose(x.mean((0, 1)), means, atol=0.015)
        assert x.max() <= V - 1
    process = Counts(field=FIELD, rounding="poisson")
    x = np.asarray(POSTERIOR(process, jax.random.key(1), xt - 4, rate / 10, 0.5, 0.0))
    np.testing.assert_allclose(x.mean((0, 1)), [0.03, 0.125, 0.9], atol=0.03)
    for rounding in ("stochastic", "nearest", "poisson"):
        process = Counts(field=FIELD, rounding=rounding)
        for t in (0.0, 0.4, 1.0):  # a token whose time stays keeps its value
            np.testing.assert_array_equal(POSTERIOR(process, jax.random.key(2), xt, rate, t, t), xt)


def test_published_bridge_and_input():
    process = Counts(field=FieldSpec((2,), vocab=256, features=16), scale=1.0, rounding="nearest")
    arrays = golden("blackout/bridge_and_loss")
    a = {name: jnp.asarray(x.reshape(3, 2, 16) if x.ndim == 4 else x) for name, x in arrays.items()}
    t = (a["step"][:, None] + 1) / 1000
    c = jax.jit(process.corrupt)(a["x0"], a["u"], t)
    np.testing.assert_array_equal(c.xt, a["x_t"])
    np.testing.assert_allclose(process.network(c.xt, t)[0], a["net_input"], atol=2e-5)
    np.testing.assert_allclose(process.estimate(a["net_output"], c.xt, t), a["rate"], rtol=1e-5)
    np.testing.assert_array_equal(jnp.clip(jnp.round(a["bridge_rate"]), 0, 255 - a["bridge_x_t"]), a["bridge_n"])
    chance = a["bridge_p"]
    births = QUANTILE(a["bridge_u"], a["bridge_n"], chance, 1 - chance, most=255)
    np.testing.assert_array_equal(a["bridge_x_t"] + births, a["bridge_x_s"])
    chance, _ = process.birth_probability(0.601, 0.6)  # the bridge's times are those of steps 600 and 601
    np.testing.assert_allclose(chance, arrays["bridge_p"], rtol=1e-4)


def test_the_contract_and_its_refusals():
    assert isinstance(PROCESS, Process)
    assert (PROCESS.outputs, PROCESS.guided, PROCESS.inputs) == (3, 3, FieldSpec((4,), features=3))
    value, time = PROCESS.network(jnp.array([[[0, 3, 6]]]), jnp.zeros((1, 1)))
    np.testing.assert_allclose(value, [[[-1, 0, 1]]])  # data in -1 ... 1
    assert time == 0
    assert PROCESS.hint(jnp.full((1, 4, 3), 3.0)).max() == 0.5
    for words, options in [
        ("features=3", {"field": FieldSpec((4,), features=3)}),
        ("'up' is unknown", {"rounding": "up"}),
        ("steps=1", {"steps": 1}),
        ("scale is 0", {"scale": 0}),
    ]:
        with pytest.raises(ValueError, match=words):
            Counts(**{"field": FIELD} | options)
