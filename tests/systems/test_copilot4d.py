"""Copilot4D: moving digits and their judge, masks with wrong ids between them, frames that see the past alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import copilot4d_digits
from src.build import build_system
from src.corruption.categorical import Categorical
from src.corruption.mask_and_uniform import MaskAndWrong
from src.data.sources.moving_digits import DIRECTIONS, MovingDigits, frames_of, places_of
from src.data.templates.class_label import ClassLabel
from src.evals.moving_digits import score_frames
from src.interfaces import FieldSpec
from src.sampling.steps.categorical import Confidence
from src.train.system import clean_view
from tests.helpers.oracle import CategoricalOracle

IDS = FieldSpec((3,), vocab=3)
TIMES = np.linspace(0.7, 0, 4)


@pytest.fixture(scope="module")
def system():
    return build_system(copilot4d_digits.get_config("debug"))


def test_a_frame_and_the_direction_decide_the_next():
    source = MovingDigits()
    for number in (0, 7, len(source) - 1):
        example = source[number]
        step = list(DIRECTIONS.values())[example["label"]]
        frames = frames_of(example["image"][None])[0]
        for before, after in itertools.pairwise(frames):
            np.testing.assert_array_equal(after, np.roll(before, step, (0, 1)))
        assert places_of(frames[2:3], frames[0])[0].tolist() == (2 * np.array(step) % 8).tolist()
    with pytest.raises(ValueError, match="frames=1"):
        MovingDigits(frames=1)


def test_predictions_are_judged():
    """Right frames have no error, repeated ones are at another place, and mixed patches are far in pixels."""
    source = MovingDigits()
    clips = frames_of(np.stack([source[number]["image"] for number in range(60)]))
    found, hits = score_frames(clips, clips, clips, clips, given=1)
    assert hits.shape == (60, 2) and hits.all()
    assert found["motion_accuracy"] == 1 and found["pixel_error"] == 0 and found["fdpx"] < 1e-6
    assert found["motion_accuracy_still"] == 0 and found["pixel_error_still"] > 0.1
    assert found["fdpx_floor_patches"] > 0.2


def test_past_frames_are_given(system):
    """A prompt has a frame, of which no token is made; without them it is refused."""
    task = system.tasks["predict"].task
    example = task.source[3]
    tokens = task.prompt([task.template.question(example)])[1].tokens["image"]
    assert tokens.target[0].tolist() == [False] * 16 + [True] * 32 and tokens.valid.all()
    np.testing.assert_array_equal(tokens.value[0, :8], example["image"][:8])
    assert not tokens.value[0, 8:].any()
    fields, source = system.fields, task.source
    for given, words in [(17, "17 tokens are no whole rows"), (48, "given=48 of 48 tokens")]:
        with pytest.raises(ValueError, match=words):
            ClassLabel(given=given).bind(fields, source)
    for segment in ({"order": "random"}, {"splits": (1, 2)}):
        with pytest.raises(ValueError, match="given=16 first tokens of 'image' go with order='rows' and no splits"):
            ClassLabel(given=16, segment=segment).bind(fields, source)
    with pytest.raises(ValueError, match=r"the past must be an array \(8, 8, 1\)"):
        task.prompt([{"label": 0}])


def test_who_sees_whom(system):
    """A frame sees itself and the past; denoised alone it sees itself."""
    frame = np.arange(48) // 16
    for name, wanted in [
        ("predict", frame[:, None] >= frame),
        ("together", frame[:, None] >= frame),
        ("alone", frame[:, None] == frame),
    ]:
        read, write, group = system.tasks[name].layout.static_orders()
        sees = (write[None] <= read[:, None]) | ((group[None] == group[:, None]) & (group[None] > 0))
        np.testing.assert_array_equal(sees, wanted, err_msg=name)


def test_noise_is_masks_and_wrong_ids():
    """Masked sin(pi t / 2); of the others a share of the row, uniform up to `wrong`; nothing at t = 0."""
    vocab, n, length = 5, 2000, 64
    process = MaskAndWrong(field=FieldSpec((length,), vocab=vocab), wrong=0.4)
    x0 = jnp.broadcast_to(jnp.arange(length) % vocab, (n, length))

    @jax.jit
    def run(t):
        noise = process.noise(jax.random.key(1), x0.shape)
        return process.corrupt(x0, noise, t).xt, noise["wrong"][:, 0], process.masses(t)

    xt, share, (kept, masked, _) = run(jnp.float32(0.3))
    mask, other = xt == vocab, (xt != x0) & (xt < vocab)
    np.testing.assert_allclose(
        [mask.mean(), 1 - mask.mean() - other.mean() * vocab / (vocab - 1)], [masked, kept], atol=0.01
    )
    by_row = other.sum(1) / np.maximum((~mask).sum(1), 1) * vocab / (vocab - 1)
    assert np.corrcoef(by_row, share)[0, 1] > 0.75 and np.abs(by_row - share).mean() < 0.08
    np.testing.assert_array_equal(run(jnp.float32(0.0))[0], x0)
    with pytest.raises(ValueError, match="wrong is 1"):
        MaskAndWrong(field=IDS, wrong=1)
    with pytest.raises(ValueError, match="no mask id"):
        Confidence(masks=True).init(Categorical(field=IDS, mask=0.0), jnp.zeros((1, 3), jnp.int32))


class Equal(CategoricalOracle):
    """All tokens of a row are equal."""

    def probabilities(self):
        same = (self.states() == self.states()[:, :1]).all(axis=1)
        return same / same.sum()


def never(xt, t):
    """A second evaluation, which no step asks for."""
    raise AssertionError


@functools.partial(jax.jit, static_argnums=(0, 1))
def sampled(process, sampler, start):
    """Rows after three steps from t = 0.7, and the masks of each step, with the exact posterior."""
    oracle, xt, state, masks = Equal(process), start, sampler.init(process, start), []
    for number, (t, s) in enumerate(itertools.pairwise(TIMES)):
        t, s = jnp.float32(t), jnp.float32(s)
        key = jax.random.fold_in(jax.random.key(0), number)
        xt, state = sampler.step(process, key, oracle.estimate(xt, t), xt, t, s, state, never)
        masks.append((xt == 3).sum(1))
    return xt, jnp.stack(masks)


@pytest.mark.faults
def test_a_wrong_token_is_taken_back():
    """Two ids against one: with wrong ids in the noise the one is corrected, with masks alone it stays."""
    start = jnp.tile(jnp.array([[0, 0, 1]]), (200, 1))
    fixes = Confidence(gumbel=1.0, masks=True, revise=True)
    ours, masks = sampled(MaskAndWrong(field=IDS, carry_over=False), fixes, start)
    assert (ours == 0).all(axis=1).mean() > 0.7
    # ceil(m(s) 3) tokens stay masked, and none at s = 0
    wanted = np.minimum(np.ceil(3 * np.sin(np.pi / 2 * TIMES[1:3])), 2)
    np.testing.assert_array_equal(masks, np.tile([[*wanted, 0]], (200, 1)).T)
    theirs, _ = sampled(Categorical(field=IDS), Confidence(gumbel=1.0), start)
    assert (theirs == start).all()


@pytest.mark.faults
def test_frames_alone_do_not_depend_on_each_other(system):
    """The Jacobian of a frame's logits by another frame's embedding is zero; with the past it is not."""
    params = jax.jit(system.init)(jax.random.key(0))
    params = jax.tree.map(lambda a: a + 0.1 * jax.random.normal(jax.random.key(1), a.shape), params)
    net, ids, moved = system.architecture.bind(params), jnp.zeros((2, 48), jnp.int32), {}
    for name in ("together", "alone"):
        plan = system.tasks[name]
        view = clean_view(system.fields, plan.layout, jax.tree.map(jnp.asarray, plan.task.fake(2, 0)))
        view = view.replace(times={"image": jnp.full((2, 1), 0.5)})

        @jax.jit
        def states(ids, name=name, view=view):
            return net.hidden({name: view.replace(noisy={"image": ids})})[name].of("image")

        change = np.abs(states(ids) - states(ids.at[:, :16].set(3)))
        moved[name] = change.reshape(2, 3, -1).max(axis=(0, 2))
    assert (moved["together"] > 1e-3).all() and moved["alone"][0] > 1e-3 and not moved["alone"][1:].any(), moved
