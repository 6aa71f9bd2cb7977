"""What the diffusion objective shows the network: the noised field and the time it was noised for."""

from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear, LinearBetas
from src.interfaces import Hidden, ImageField, Net, Prediction, View
from src.objectives.diffusion import Diffusion
from src.sequence.layout import Layout, Segment

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

    objective = Diffusion("image", process=Gaussian(schedule, parameterization), times=law, weight=lambda *a: 1.0)
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


def test_rows_that_are_not_valid_are_in_no_sum_whatever_they_hold():
    """The terms are those of the other rows, also where the network says NaN."""
    process = Gaussian(LinearBetas(), "eps", variance="learned_range")
    objective = Diffusion("image", process=process, times=lambda *a: TIMES, weight=lambda *a: jnp.ones(()))
    x0, said, logits = np.random.default_rng(0).normal(size=(3, 4, 3, 2)).astype(np.float32)
    _, aux = objective.prepare(View({"image": jnp.asarray(x0)}, {}, {}), {}, jax.random.key(0), True)
    net = create_autospec(Net, instance=True)

    @jax.jit
    def terms(said, logits, flags, aux):
        net.image_prediction.return_value = Prediction(said, logits)
        states = jnp.zeros((len(said), 3, 1))
        hidden = Hidden(states, states[..., 0] == 0, {"image": states[:, :1]}, Layout((Segment("image", "image", 3),)))
        return objective.loss(net, hidden, {"image": ImageField(states[:, None], flags)}, aux)

    valid = np.array([True, False, True, False])
    picked = jax.tree.map(lambda a: a[valid], (said, logits, None, aux))
    spoilt = [np.where(valid[:, None, None], a, np.nan) for a in (said, logits)]
    found, expected = terms(*spoilt, valid, aux), terms(*picked)
    assert found.keys() == expected.keys() > {"mse", "vlb"}
    for name, term in found.items():  # those by time, too
        np.testing.assert_allclose(term.total, expected[name].total, rtol=1e-5)
        assert term.count == expected[name].count
    assert found["mse"].count == found["vlb"].count == 2
