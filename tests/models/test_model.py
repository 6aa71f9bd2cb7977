"""The transformer against itself: cached = full forward for every mode and conditioning, remat, bf16, shared passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.interfaces import Batch, View
from src.models.layers import sincos_2d, timestep_features
from src.models.model import bind
from src.models.rotary import rotary_angles, rotary_frequencies, rotary_magnitude, rotate
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers import small
from tests.helpers.models import FEATURES, ROWS, VOCAB, hidden, make, row, tokens, value

CONDITIONINGS = ["Conditioning", "TimeToken", "AdaLNBeforeTrunk", "AdditivePerLayer", "AdaLNPerLayer"]
NAMES = ("text.p", "image", "text.c")
OTHER = {"head_dim": 6, "qkv_bias": True, "sliding_window": 4, "rope_scaling": ("dynamic", 2.0, 4)}  # of a trunk


@pytest.mark.parametrize(
    "mode, conditioning, options",
    [("causal", "TimeToken", OTHER), ("block:2", "TimeToken", {}), ("bidirectional", CONDITIONINGS[-1], {})]
    + [pytest.param("bidirectional", c, {}, marks=pytest.mark.faults) for c in CONDITIONINGS[:-1]],
)
def test_prefill_and_decode_equal_the_full_forward(mode, conditioning, options):
    """A prompt, a noisy image with its lead, and a text token by token, from a slot that is known when it runs."""
    architecture, params = make(conditioning, **options)
    view = row(mode, conditioning)
    prompt, image, caption = view.layout.segments

    def compare(params):
        net = bind(architecture, params)
        full = net.hidden({"task": view})["task"]
        cache, spec, parts = net.start_cache(view), view.layout.spec(view.batch), []
        for segment, copy, start, size in [(prompt, "clean", 0, 3), (image, "noisy", 0, 4)] + [
            (caption, "clean", jnp.asarray(j), 1) for j in range(3)
        ]:
            state, cache = net.extend(view, segment, copy, start, size, spec, cache)
            parts.append(state)
        return jnp.concatenate([full.of(name) for name in NAMES], axis=1), jnp.concatenate(parts, axis=1)

    full, cached = jax.jit(compare)(params)
    valid = np.concatenate([view.batch.tokens[name].valid for name in NAMES], axis=1)
    np.testing.assert_allclose(np.asarray(cached)[valid], np.asarray(full)[valid], atol=2e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_time_reaches_the_image_and_what_follows_only(conditioning):
    architecture, params = make(conditioning)
    view = row("bidirectional", conditioning)
    later = view.replace(times={"image": view.times["image"] + 100})
    a, b = (hidden(architecture, params, v) for v in (view, later))
    prompt = np.asarray(view.batch.tokens["text.p"].valid)
    np.testing.assert_array_equal(np.asarray(a.of("text.p"))[prompt], np.asarray(b.of("text.p"))[prompt])
    for name in ("image", "text.c"):
        moved = np.abs(np.asarray(a.of(name)) - np.asarray(b.of(name))).max(axis=-1)
        assert (moved[np.asarray(view.batch.tokens[name].valid)] > 1e-4).all(), name


def test_image_tokens_see_their_own_span_and_nothing_later():
    architecture, params = make()
    view = row("bidirectional", "TimeToken")

    def image_row(values, token):
        return hidden(architecture, params, view.replace(noisy={"image": values})).of("image")[0, token].sum()

    grads = jnp.abs(jax.grad(image_row)(view.noisy["image"], 0))
    assert (grads[0].max(axis=-1) > 0).all() and (grads[1] == 0).all()
    other = value(view, "text.c", (view.batch.tokens["text.c"].value + 1) % VOCAB)
    a, b = (hidden(architecture, params, v).of("image") for v in (view, other))
    np.testing.assert_array_equal(a, b)


def test_tasks_of_one_length_share_a_pass_without_meeting():
    architecture, params = make()
    view = row("bidirectional", "TimeToken")
    layout = FixedLayout((Segment("text.s", view.layout.length),))
    text = View(Batch({"text.s": tokens(jnp.ones((3, layout.length), jnp.int32))}), layout)
    run = jax.jit(lambda params, views: bind(architecture, params, measure=lambda h: h[..., 0, 0]).run(views))
    joint, (seen,) = run(params, {"a": view, "b": text})
    assert seen.shape == (2, ROWS + 3), "one pass of all rows through two blocks"
    for name, alone in (("a", run(params, {"a": view})[0]), ("b", run(params, {"b": text})[0])):
        np.testing.assert_allclose(joint[name].sequence, alone[name].sequence, atol=1e-5)


@functools.cache
def loss_and_gradients(**change):
    """Of the mean square of a trunk's hidden states."""
    view = row("bidirectional", "TimeToken")
    architecture, params = make(**change)

    def loss(params):
        return (hidden(architecture, params, view).sequence.astype(jnp.float32) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))(params)


LONG = [pytest.param({"remat": name}, marks=pytest.mark.faults) for name in ("full", "names")]


@pytest.mark.parametrize("change", [{"remat": "dots"}, {"dtype": "bfloat16"}, *LONG])
def test_remat_and_bfloat16_change_memory_not_meaning(change):
    found, grads = loss_and_gradients()
    other, grads_other = loss_and_gradients(**change)
    tolerance = 0.05 if "dtype" in change else 1e-5
    np.testing.assert_allclose(other, found, rtol=tolerance)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads_other))
    if "remat" in change:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, grads_other)


def test_positions_and_features_against_their_formulas():
    table = sincos_2d(16, 16, 2048)
    expected = {(1, 0): 0.84147, (1, 512): 0.54030, (1, 1024): 0.0, (1, 1536): 1.0}
    expected |= {(16, 0): 0.0, (16, 512): 1.0, (16, 1024): 0.84147, (16, 1536): 0.54030}
    for place, wanted in expected.items():
        assert table[place] == pytest.approx(wanted, abs=1e-5)
    features = timestep_features(jnp.asarray([1.0]))[0]
    np.testing.assert_allclose(features[jnp.array([0, 1, 128])], [0.5403, 0.5974, 0.8415], atol=1e-4)
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    position = jnp.asarray([[3], [7]])
    turned, moved = (rotate(x, rotary_angles(p, 8, 10_000.0)) for p in (position, position + 5))
    dot = lambda y: jnp.einsum("bshd,bthd->st", y, y)
    np.testing.assert_allclose(dot(turned), dot(moved), atol=1e-5)
    assert jnp.abs(dot(turned) - dot(x)).max() > 1e-2


# inv_freq of transformers 5.24's LlamaRotaryEmbedding, of heads of 24, rows of 48 tokens
SCALED = {
    (1e4, ("dynamic", 2.0, 32)): [1.0, 0.4358131, 0.18993306, 0.082775325, 0.036074571, 0.015721774, 0.0068517546,
        0.0029860851, 0.0013013746, 0.00056715624, 0.00024717418, 0.00010772171],
    (1e4, ("dynamic", 2.0, 64)): [1.0, 0.46415889, 0.21544345, 0.1, 0.046415884, 0.021544348, 0.0099999998,
        0.0046415897, 0.0021544343, 0.001, 0.00046415895, 0.00021544342],
    (1e6, ("yarn", 4.0, 32, 1, 32768, 1.138629436111989)): [1.0, 0.31622776, 0.099999994, 0.031622779, 0.0099999988,
        0.0025693511, 0.00062500004, 0.00013834969, 2.4999992e-05, 7.9056936e-06, 2.5000008e-06, 7.9056923e-07],
    (1e4, ("yarn", 16.0, 8, 2, 64, 0.9)): [1.0, 0.31910923, 0.080791287, 0.0062500001, 0.0029009928, 0.0013465218,
        0.00062499999, 0.00029009936, 0.00013465215, 6.2500003e-05, 2.9009934e-05, 1.3465214e-05],
    (5e5, ("llama3", 8.0, 1.0, 4.0, 8192)): [1.0, 0.33503163, 0.11224619, 0.037606031, 0.012599208, 0.0042211348,
        0.00052484602, 5.92258e-05, 1.9842508e-05, 6.6478697e-06, 2.2272475e-06, 7.4619794e-07],
    (1e4, ("linear", 4.0)): [0.25, 0.11603972, 0.053860862, 0.025, 0.011603971, 0.0053860871, 0.0024999999,
        0.0011603974, 0.00053860858, 0.00025000001, 0.00011603974, 5.3860855e-05],
}  # fmt: skip


def test_scaled_rotary_frequencies_are_those_of_transformers():
    for (theta, scaling), want in SCALED.items():
        np.testing.assert_allclose(rotary_frequencies(12, theta, scaling, 48), want, rtol=1e-6)  # theirs: float32
        angles = rotary_angles(jnp.asarray([[7]]), 24, theta, scaling, 48)[0]
        np.testing.assert_allclose(angles, 7 * np.array(want), 2e-6)
    x, angles = jax.random.normal(jax.random.key(0), (1, 3, 2, 24)), jnp.zeros((3, 12))
    assert rotary_magnitude(("yarn", 4.0, 32, 1, 64, 1.25)) == 1.25 and rotary_magnitude(("linear", 2.0)) == 1
    np.testing.assert_allclose(rotate(x, angles, 1.25), 1.25 * x, rtol=1e-6)


def test_a_trunk_rotates_by_its_scaling():
    view, outputs = row("causal", "Conditioning"), []
    for scaling in ((), ("linear", 2.0), ("yarn", 2.0, 32, 1, 8, 1.5)):
        architecture, params = make("Conditioning", depth=1, rope_scaling=scaling)
        outputs.append(jax.jit(lambda p, a=architecture: bind(a, p).hidden({"t": view})["t"].sequence)(params))
    assert min(jnp.abs(outputs[0] - outputs[1]).max(), jnp.abs(outputs[1] - outputs[2]).max()) > 1e-3


@pytest.mark.parametrize(
    "change, match",
    [
        ({"rope_scaling": ("yarn", 2.0)}, r"model.trunk.rope_scaling=\('yarn', 2.0\) is unknown"),
        ({"rope_scaling": ("linear",)}, "rope_scaling=.* is unknown"),
        ({"rope_scaling": ("llama3", 8.0, 4.0, 1.0, 32)}, "low must be below high"),
        ({"rope_scaling": ("yarn", 8.0, 1, 32, 64, 1.2)}, "slow must be below fast"),
        ({"rope_scaling": ("yarn", 8.0, 32, 1, 64, 1.2), "rope_theta": 1.0}, "rope_theta=1.0 must be above 1"),
        ({"sliding_window": -1}, "sliding_window=-1 must be 0"),
        ({"head_dim": 5}, "an even head size, got 5"),
        ({"head_dim": -2}, "head_dim=-2 must be at least 1"),
        ({"heads": 3}, "width=16 is not divisible by heads=3"),
        ({"kv_heads": 3}, "heads=4 is not divisible by kv_heads=3"),
        ({"norm": "batch"}, "model.trunk.norm='batch' is unknown"),
        ({"remat": "half"}, "model.trunk.remat='half' is unknown"),
        ({"init": "cleverly"}, "initializer 'cleverly' is unknown"),
        ({"dtype": "float8"}, "model.dtype='float8' is unknown"),
    ],
)
def test_refusals(change, match):
    with pytest.raises(ValueError, match=match):
        make(**change)


def test_an_image_that_is_read_has_a_clean_time_token():
    """MonoFormer's `add_before_image_tokens` stands before every image; without an image both are padding."""
    architecture, params = make()
    segments = (Segment("text.head", 2), Segment("vision", FEATURES[0], lead=1), Segment("text.rest", 2))
    layout, words = FixedLayout(segments), FixedLayout((segments[0], segments[2]))
    assert layout.length == 8 and words.length == 4
    rng = np.random.default_rng(0)
    ids = rng.integers(0, VOCAB, (2, ROWS, 2)).astype(np.int32)
    text = {name: tokens(ids[i]) for i, name in enumerate(("text.head", "text.rest"))}
    there = np.broadcast_to([[True], [False]], (ROWS, FEATURES[0]))
    image = tokens(rng.normal(size=(ROWS, *FEATURES)).astype(np.float32), there)
    view = View(Batch(text | {"vision": image}), layout)
    net = bind(architecture, params)
    embedded, states = net.embedded(view), net.hidden({"t": view})["t"].sequence
    expected = net.model.conditioning.token(net.model.time(jnp.zeros((ROWS, 1))))
    np.testing.assert_array_equal(embedded.x[:, 2:3], expected)
    assert np.abs(np.asarray(expected)).max() > 0
    np.testing.assert_array_equal(embedded.spec.segment > 0, [[True] * 8, [True] * 2 + [False] * 4 + [True] * 2])
    alone = net.hidden({"t": View(Batch(text), words)})["t"].sequence
    kept = np.asarray(states)[1, [0, 1, 6, 7]]
    np.testing.assert_allclose(kept, np.asarray(alone)[1], atol=1e-5)
    assert np.abs(np.asarray(states)[0, 6:] - np.asarray(alone)[0, 2:]).max() > 1e-2


def test_the_latest_time_of_the_names_on_a_token_counts():
    """Whichever name is given (time 0), the network is told the time of the other."""
    rows = {"box": small.vector_field("box"), "image": small.vector_field("image")}
    net = small.net(rows, {"box": small.VECTORS, "image": small.VECTORS})
    segment = Segment(("box", "image"), 4, 0, "noisy", lead=1)
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(2, 4, 4)).astype(np.float32) for name in rows}
    batch = small.batch(**{name: small.tokens(value, target=True) for name, value in values.items()})

    @jax.jit
    def states(times):
        view = small.view_of((segment,), batch, {n: jnp.asarray(v) for n, v in values.items()}, times)
        return net.hidden({"": view})[""].sequence

    at = lambda **times: states({name: jnp.full((2, 1), t) for name, t in times.items()})
    both = at(box=900.0, image=900.0)
    small.close(at(box=900.0, image=0.0), both, 0.0)
    small.close(at(box=0.0, image=900.0), both, 0.0)
    assert np.abs(at(box=0.0, image=0.0) - both).max() > 0.01


def test_the_lead_is_told_the_time_of_the_tokens_that_are_made():
    """A given first token has time 0, and the time token in front of the block still has that of the others."""
    net = small.net({"image": small.vector_field()}, {"image": small.VECTORS})
    segment = Segment("image", 4, 0, "noisy", lead=1)
    value = np.random.default_rng(0).normal(size=(1, 4, 4)).astype(np.float32)
    batch = small.batch(image=small.tokens(value, target=True))

    @jax.jit
    def at(times):
        view = small.view_of((segment,), batch, {"image": jnp.asarray(value)}, {"image": times})
        return net.hidden({"": view})[""].sequence

    states = lambda *times: at(jnp.asarray([times]))
    early, late = states(0.0, 100.0, 100.0, 100.0), states(0.0, 900.0, 900.0, 900.0)
    assert np.abs(early - late).max() > 0.01
    small.close(states(300.0, 300.0, 300.0, 300.0), states(300.0), 1e-6)
