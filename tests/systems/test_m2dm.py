"""M2DM: the motions and their judge, and the kernel of the config."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import m2dm_motions
from src.build import build_system
from src.common.lookup import build
from src.common.tree import count_parameters
from src.corruption.mask_and_uniform import VQDiffusion
from src.data.sources.motions import ACTIONS, LENGTHS, Motions
from src.interfaces import FieldSpec

WINDOWS, CODES = 16, 6


def kernel(variant=""):
    """The process of the config, on fewer codes."""
    group = m2dm_motions.get_config(variant).fields.motion.process
    return build("corruption", group, field=FieldSpec((WINDOWS, 1), vocab=CODES))


def test_the_judge_knows_every_motion():
    """Each example is right and leaves nothing; with another phase it still is, with two phases it is not."""
    source = Motions()
    for number in range(len(source) - 96, len(source)):
        example = source[number]
        found = source.judged(example, example["image"])
        assert found["right"] == 1 and found["left"] < 1e-9, example.where
    for action in ACTIONS:
        first, second = (source.curve(action, "for long", phase) for phase in (0, 1))
        asked = {"action": action, "length": "for long"}
        assert source.judged(asked, -0.7 * second)["right"] == 1
        mixed = np.where(np.arange(WINDOWS)[:, None, None] % 2, first, second)
        assert source.judged(asked, mixed)["left"] > 0.1 and source.judged(asked, mixed)["right"] == 0
        other = source.judged(asked | {"length": "briefly"}, first)
        assert (other["right"], other["action"], other["length"]) == (0, 1, 0) and other["left"] < 1e-9
    assert source.judged(asked, np.zeros(source.image_shape))["left"] == 1
    assert len(set(source.every("caption"))) == len(ACTIONS) * len(LENGTHS)
    with pytest.raises(ValueError, match="windows=7"):
        Motions(windows=7)


def test_important_windows_are_those_that_move():
    """The order of the config is that of the energy that is lost without a window, over the training motions."""
    source = Motions()
    energy = np.mean([source[number]["image"] ** 2 for number in range(600)], axis=(0, 2, 3))
    importance = np.asarray(kernel().schedule.importance)
    assert importance.tolist() == [3] * 6 + [2] * 4 + [1] * 4 + [0] * 2
    lost = [energy[importance == level] for level in range(4)]
    assert all(low.max() < high.min() for low, high in itertools.pairwise(lost))


def test_each_window_has_a_chain_of_its_own():
    """q(x_t | x_0) = sum over x_s of q(x_t | x_s) q(x_s | x_0), for every x_0 and x_t of each window."""
    process = kernel()
    x0, xt = (jnp.repeat(each.reshape(-1, 1), WINDOWS, 1) for each in jnp.mgrid[:CODES, : CODES + 1])
    t, s = jnp.full(xt.shape, 0.7), jnp.full(xt.shape, 0.3)

    @jax.jit
    def both(x0, xt):
        total = (process.spread(jax.nn.one_hot(x0, CODES), s) * process.arrival(xt, t, s)).sum(-1)
        return total, jnp.take_along_axis(process.likelihood(xt, t), x0[..., None], -1)[..., 0]

    np.testing.assert_allclose(*both(x0, xt), atol=1e-6)


def test_without_importance_it_is_the_kernel_of_vq_diffusion():
    field = FieldSpec((WINDOWS, 1), vocab=CODES)
    theirs = VQDiffusion(field=field, steps=100, keep=(0.99, 0.0), masked=(0.009, 0.9))
    random = np.random.RandomState(0)
    xt, p = random.randint(0, CODES + 1, (3, WINDOWS)), random.dirichlet(np.ones(CODES), (3, WINDOWS))
    t, s = jnp.float32([[1.0], [0.5], [0.3]]), jnp.float32([[0.6], [0.1], [0.0]])
    xt, p, kernels = jnp.asarray(xt), jnp.float32(p), (kernel("plain"), kernel(), theirs)
    plain, ours, wanted = jax.jit(lambda: [each.reverse(xt, p, t, s) for each in kernels])()
    np.testing.assert_allclose(plain, wanted, atol=2e-6)
    assert np.abs(ours - wanted)[:2].max(axis=(1, 2)).min() > 0.01


def test_published_sizes_build():
    system = build_system(m2dm_motions.get_config("humanml3d"))
    assert system.fields["motion"].process.inputs == FieldSpec((49, 1), vocab=513)
    assert count_parameters(jax.eval_shape(system.init, jax.random.key(0))) > 350_000_000
