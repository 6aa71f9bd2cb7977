"""A weighted loss is the same number in every parameterization of the same network."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import PARAMETERIZATIONS, Gaussian
from src.corruption.schedules import GVP, VP, CosineBetas, Linear, LinearBetas
from src.interfaces import FieldSpec
from src.objectives.losses.weighting import ELBO, Constant, MinSNR

SCHEDULES = [LinearBetas(), CosineBetas(), Linear(), GVP(), VP()]
NAME = lambda value: type(value).__name__
LAWS = (MinSNR(gamma=5.0), ELBO(), Constant(value=2.0, on="velocity"))
T = jnp.array([0.1, 0.3, 0.5, 0.7, 0.9])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_loss_does_not_depend_on_the_parameterization(schedule):
    process = Gaussian(field=FieldSpec((2,), features=3), schedule=schedule, parameterization="v")

    @jax.jit
    def weighted():
        a, b, c = jax.random.split(jax.random.key(0), 3)
        shape = (5, 2, 3)
        corrupted = process.corrupt(jax.random.normal(a, shape), jax.random.normal(b, shape), T)
        targets = process.targets(corrupted)
        wrong = targets["v"] + 0.5 * jax.random.normal(c, shape)
        estimate = process.estimate(wrong, corrupted.xt, T)
        loss = lambda law, name: law(schedule, T, name) * ((getattr(estimate, name) - targets[name]) ** 2).mean((1, 2))
        return [{name: loss(law, name) for name in PARAMETERIZATIONS} for law in LAWS]

    for losses in weighted():
        for name in PARAMETERIZATIONS:
            np.testing.assert_allclose(losses[name], losses["x0"], rtol=2e-3, err_msg=name)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_min_snr_is_the_published_weight(schedule):
    snr = np.asarray(jax.jit(lambda: schedule.alpha(T) / schedule.sigma(T))(), np.float64) ** 2
    weight = jax.jit(lambda name: MinSNR(gamma=2.0)(schedule, T, name), static_argnums=0)
    np.testing.assert_allclose(weight("x0"), np.minimum(snr, 2), rtol=1e-4)
    np.testing.assert_allclose(weight("eps"), np.minimum(1, 2 / snr), rtol=1e-4)
    if not isinstance(schedule, Linear):  # the formula for v assumes alpha^2 + sigma^2 = 1
        np.testing.assert_allclose(weight("v"), np.minimum(snr, 2) / (snr + 1), rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_elbo_is_half_the_slope_of_the_snr(schedule):
    t = T + 0.00037  # between the points of a table, where the slope exists
    snr = lambda time: jnp.exp(schedule.log_snr(time))
    np.testing.assert_allclose(
        jax.jit(lambda: ELBO()(schedule, t, "x0"))(), -0.5 * jax.jit(jax.vmap(jax.grad(snr)))(t), rtol=2e-3
    )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=NAME)
def test_weights_are_finite_at_the_ends(schedule):
    ends, near = jnp.array([0.0, 1.0]), jnp.array([schedule.t_min, schedule.t_max])
    weights = jax.jit(lambda: [(MinSNR()(schedule, ends, p), ELBO()(schedule, near, p)) for p in PARAMETERIZATIONS])()
    assert np.isfinite(weights).all()


def test_constant_and_refusal():
    np.testing.assert_array_equal(Constant(value=2.0)(Linear(), T, "eps"), [2.0] * 5)
    np.testing.assert_allclose(Constant(on="x0")(Linear(), T, "velocity"), T**2, rtol=1e-5)  # x_0 = x_t - t velocity
    with pytest.raises(ValueError, match="'clean' is unknown"):
        Constant(on="clean")(Linear(), T, "eps")
    with pytest.raises(ValueError, match="'epsilon' is unknown"):
        MinSNR()(Linear(), T, "epsilon")
