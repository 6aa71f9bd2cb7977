"""What the diffusion objective shows the network: the noised field and the time it was noised for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear, LinearBetas
from src.interfaces import View
from src.objectives.denoise import Denoise

TIMES = jnp.asarray([[0.001], [0.1], [0.3], [1.0]])
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 99, 299, 999], None, None]  # Ho et al. 2020
T = np.asarray(TIMES)[..., None]


@pytest.mark.parametrize(
    "schedule, parameterization, told, signal, noise",
    [
        (Linear(), "velocity", [[1], [100], [300], [1000]], 1 - T, T),
        (LinearBetas(), "eps", [[0], [99], [299], [999]], np.sqrt(KEPT), np.sqrt(1 - KEPT)),
    ],
    ids=["flow", "ddpm"],
)
def test_the_network_is_told_the_time_of_its_noise(schedule, parameterization, told, signal, noise):
    asked = []

    def law(key, shape):
        asked.append(shape)
        return TIMES

    objective = Denoise("image", process=Gaussian(schedule, parameterization), times=law, weight=lambda *a: 1.0)
    x0 = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    clean = View({"prompt": jnp.ones((4, 2), jnp.int32), "image": jnp.asarray(x0)}, {}, {})
    view, (kept, noised, t) = objective.prepare(clean, {}, jax.random.key(0), True)
    assert asked == [(4, 1)] and view.inputs["prompt"] is clean.inputs["prompt"]
    np.testing.assert_allclose(view.times["image"], told, atol=1e-3)
    np.testing.assert_allclose(view.inputs["image"], signal * x0 + noise * noised.targets["eps"], atol=1e-4)
    np.testing.assert_array_equal(noised.xt, view.inputs["image"])
    np.testing.assert_array_equal(kept, x0)
    np.testing.assert_array_equal(t, TIMES)
    again = objective.prepare(clean, {}, jax.random.key(1), True)[0]
    assert (np.abs(again.inputs["image"] - view.inputs["image"])[1:].max(axis=(1, 2)) > 1e-3).all()
