"""What the diffusion objective shows the network: the noised tokens and the time they were noised for."""

from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear, LinearBetas
from src.interfaces import Batch, Field, FieldSpec, Hidden, Net, View
from src.objectives.diffusion import BINS, STATISTICS, Diffusion, statistics, weight_by_block
from src.objectives.losses.squared_error import SquaredError
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.adaptive import Remembering
from tests.helpers.family import golden
from tests.helpers.models import tokens

TIMES = jnp.asarray([[0.001], [0.1], [0.3], [1.0]])
KEPT = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))[[0, 99, 299, 999], None, None]  # Ho et al. 2020
T = np.asarray(TIMES)[..., None]
LAYOUT = FixedLayout((Segment("prompt", 2), Segment("image", 3, 0, role="noisy")))


class Row:
    """A bound row whose head gives what it is made with."""

    def __init__(self, process, output=None):
        self.process, self.output = process, output

    def encode(self, value):
        return value

    def __call__(self, hidden, cond):
        assert hidden.shape[:2] == self.output.shape[:2] and cond.shape == (len(hidden), 1, 1)
        return self.output


def net_of(process, output=None):
    net = create_autospec(Net, instance=True)
    net.field.return_value = Row(process, output)
    return net


def clean_view(x0, valid=None, target=None):
    """Rows of a prompt and an image."""
    ids = tokens(jnp.ones((len(x0), 2), jnp.int32))
    return View(Batch({"prompt": ids, "image": tokens(x0, valid, target)}), LAYOUT)


def draw_and_prepare(objective, process, view, seed=0):
    table = {"image": Field("image", process.field, None, process)}
    return objective.prepare(net_of(process), view, objective.draw(jax.random.key(seed), table, view))


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

    process = Gaussian(field=FieldSpec((3,), features=2), schedule=schedule, parameterization=parameterization)
    objective = Diffusion("image", SquaredError(), law)
    x0 = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    clean = clean_view(x0)
    view, aux = draw_and_prepare(objective, process, clean)
    c = aux["image"]
    assert asked == [(4, 1)] and view.batch is clean.batch, "noise stands beside the data"
    np.testing.assert_allclose(view.times["image"], told, atol=1e-3)
    np.testing.assert_allclose(view.noisy["image"], signal * x0 + noise * c.noise, atol=1e-4)
    np.testing.assert_array_equal(c.xt, view.noisy["image"])
    np.testing.assert_array_equal(c.x0, x0)
    np.testing.assert_array_equal(c.t, TIMES)
    again = draw_and_prepare(objective, process, clean, 1)[0]
    assert (np.abs(again.noisy["image"] - view.noisy["image"])[1:].max(axis=(1, 2)) > 1e-3).all()


def test_given_tokens_keep_their_values_and_the_time_0():
    process = Gaussian(field=FieldSpec((3,), features=2), schedule=Linear(), parameterization="velocity")
    objective = Diffusion("image", SquaredError(), lambda key, shape: TIMES, given=True)
    x0 = np.random.default_rng(0).normal(size=(4, 3, 2)).astype(np.float32)
    target = np.array([[True, False, True]] * 4)
    view, aux = draw_and_prepare(objective, process, clean_view(x0, target=target))
    np.testing.assert_array_equal(aux["image"].t, np.where(target, TIMES, 0))
    np.testing.assert_array_equal(view.noisy["image"][:, 1], x0[:, 1])
    assert (view.noisy["image"] != x0)[:, [0, 2]].all()


@pytest.mark.parametrize("flag", ["valid", "target"])
def test_tokens_that_are_no_targets_are_in_no_sum_whatever_they_hold(flag):
    """The terms are those of the other rows, also where the network says NaN."""
    process = Gaussian(
        field=FieldSpec((3,), features=2), schedule=LinearBetas(), parameterization="eps", variance="learned_range"
    )
    objective = Diffusion("image", SquaredError(), lambda *a: TIMES)
    x0, said, logits = np.random.default_rng(0).normal(size=(3, 4, 3, 2)).astype(np.float32)
    output = np.concatenate([said, logits], axis=-1)
    _, aux = draw_and_prepare(objective, process, clean_view(x0))

    @jax.jit
    def terms(output, x0, flags, aux):
        view = clean_view(x0, **{flag: jnp.repeat(flags[:, None], 3, axis=1)})
        hidden = Hidden(view, jnp.zeros((len(output), 5, 1)), {"image": jnp.zeros((len(output), 1, 1))})
        return objective.loss(net_of(process, output), hidden, aux)

    used = np.array([True, False, True, False])
    picked = jax.tree.map(lambda a: a[used], (output, x0, used, aux))
    found, expected = terms(np.where(used[:, None, None], output, np.nan), x0, used, aux), terms(*picked)
    assert found.keys() == expected.keys() > {"mse", "vlb"}
    for name, term in found.items():  # those by time, too
        np.testing.assert_allclose(term.total, expected[name].total, rtol=1e-5)
        assert term.count == expected[name].count
    assert found["mse"].count == found["vlb"].count == 2 * 3, "one a token"


def test_statistics_by_time_and_place_add_up_to_the_loss_of_the_targets():
    rng = np.random.default_rng(0)
    values, t, target = rng.random((50, 3)), np.sort(rng.random((50, 3)), axis=0), rng.random((50, 3)) < 0.7
    t[-1], values[~target] = 1.0, np.nan
    term = statistics(*map(jnp.asarray, (values, t, target)))
    assert term.total.shape == term.count.shape == (BINS, 3) and not term.trained
    for index in (0, 7, BINS - 1):
        last = index == BINS - 1
        inside = target & (t >= index / BINS) & ((t < (index + 1) / BINS) | last)
        np.testing.assert_allclose(term.total[index], np.where(inside, values, 0).sum(axis=0), rtol=1e-5)
        np.testing.assert_array_equal(term.count[index], inside.sum(axis=0))
    np.testing.assert_allclose(term.total.sum(), values[target].sum(), rtol=1e-5)


def test_names_of_one_row_tell_its_process_together():
    """Two names of an adaptive field in one objective: the statistics of both, each token once."""
    process = Remembering(field=FieldSpec(features=2), schedule=Linear())
    segment = Segment(("image.left", "image.right"), 3, 0, role="noisy")
    table = {"image": Field("image", process.field, None, process)}
    x0 = jnp.zeros((4, 3, 2))
    targets = {"image.left": [[1, 1, 0]] * 4, "image.right": [[1, 0, 0]] * 4}
    batch = {name: tokens(x0, None, target) for name, target in targets.items()}
    view = View(Batch(batch), FixedLayout((segment,)))
    objective = Diffusion(segment.names, SquaredError(), lambda key, shape: TIMES)
    net = net_of(process, jnp.ones((4, 3, 2)))
    view, aux = objective.prepare(net, view, objective.draw(jax.random.key(0), table, view))
    terms = objective.loss(net, Hidden(view, jnp.zeros((4, 3, 1)), dict.fromkeys(batch, jnp.zeros((4, 1, 1)))), aux)
    found = terms["image" + STATISTICS]
    np.testing.assert_array_equal(found.count.sum(0), [8, 4, 0])
    np.testing.assert_allclose(found.total.sum(), sum(terms[f"{name}/mse"].total for name in batch), rtol=1e-6)


@pytest.mark.parametrize("sizes", [(6,), (2, 4), (1, 2, 3), (1, 1, 1, 1, 1, 1)], ids=str)
def test_the_published_weights_of_blocks(sizes):
    """From 2 at the row's first block towards 1, by the place where a block begins (CausalFusion)."""
    wanted = golden("causalfusion/mask_and_weights")["weight_linear_" + "_".join(map(str, sizes))]
    block = np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)
    np.testing.assert_allclose(weight_by_block(block, 2.0), wanted, rtol=1e-6)
    np.testing.assert_allclose(weight_by_block(jnp.asarray([block, block]), 2.0), [wanted] * 2, rtol=1e-6)
