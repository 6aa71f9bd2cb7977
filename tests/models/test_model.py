"""The transformer against itself: cached = full forward for every mode and conditioning, remat, bf16, shared passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.interfaces import ImageField, TokenField, View
from src.models.build import Fields, build_model
from src.models.layers import rotary_angles, rotate, sincos_2d, timestep_features
from src.models.model import bind
from src.sequence.layout import Layout, Segment, with_time_tokens
from src.sequence.view import clean_view

ROWS, VOCAB = 2, 11
CONDITIONINGS = ["Conditioning", "TimeToken", "AdaLNBeforeTrunk", "AdditivePerLayer", "AdaLNPerLayer"]


def make(conditioning="TimeToken", seed=0, vision_features=None, **trunk):
    """(graph, params) of a small model whose every tensor is random, so that nothing hides behind a zero."""
    config = {
        "dtype": trunk.pop("dtype", "float32"),
        "trunk": {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "qk_norm": True} | trunk,
        "conditioning": {"name": f"conditioning:{conditioning}"},
    }
    config |= {group: {} for group in ("time", "text", "text_head", "image", "image_head", "labels", "vision")}
    fields = Fields(VOCAB, 4, 1, (2, 2), None, vision_features)
    graph, state = nnx.split(build_model(config, fields, nnx.Rngs(seed)))
    params = nnx.to_pure_dict(state)
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    noisy = [a + 0.2 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys, strict=True)]
    return graph, jax.tree.unflatten(structure, noisy)


def row(mode, conditioning):
    """[prompt PAD] [image] [caption PAD], rows of different lengths, and its view."""
    layout = Layout((Segment("p", "text", 3), Segment("i", "image", 4, mode), Segment("c", "text", 3)))
    layout = with_time_tokens(layout) if conditioning == "TimeToken" else layout
    rng = np.random.default_rng(0)
    inputs = {n: jnp.asarray(rng.integers(0, VOCAB, (ROWS, 3)), jnp.int32) for n in ("p", "c")}
    inputs["i"] = jnp.asarray(rng.normal(size=(ROWS, 4, 4)), jnp.float32)
    valid = {"p": jnp.asarray([[1, 1, 1], [1, 1, 0]], bool), "c": jnp.asarray([[1, 1, 0], [1, 1, 1]], bool)}
    return layout, View(inputs, valid, {"i": jnp.asarray([[500.0], [3.0]])})


@pytest.mark.parametrize(
    "mode, conditioning",
    [(m, "TimeToken") for m in ("causal", "block:2")] + [("bidirectional", c) for c in CONDITIONINGS],
)
def test_prefill_and_decode_equal_the_full_forward(mode, conditioning):
    graph, params = make(conditioning)
    layout, view = row(mode, conditioning)

    def compare(params):
        net = bind(graph, params)
        full = net.hidden({"task": (layout, view)})["task"]
        cache, slot, parts = net.start_cache(layout, ROWS), 0, []
        for part in (layout.segments[:1], layout.segments[1:-1]):
            part = Layout(part)
            hidden, cache = net.extend(layout, part, slot, view, cache)
            parts.append(hidden.sequence)
            slot += part.length
        for j in range(3):
            ids, valid = view.inputs["c"][:, j], view.valid["c"][:, j]
            state, cache = net.extend_token(layout, ids, valid, jnp.asarray(slot + j), cache)
            parts.append(state[:, None])
        return full.sequence, jnp.concatenate(parts, axis=1), full.valid

    full, cached, valid = jax.jit(compare)(params)
    np.testing.assert_allclose(np.asarray(cached)[valid], np.asarray(full)[valid], atol=2e-5)


@pytest.mark.parametrize("conditioning", CONDITIONINGS[1:])
def test_time_reaches_the_image_and_what_follows_only(conditioning):
    graph, params = make(conditioning)
    layout, view = row("bidirectional", conditioning)
    later = view.replace(times={"i": view.times["i"] + 100})
    net = bind(graph, params)
    a, b = (net.hidden({"t": (layout, v)})["t"] for v in (view, later))
    prompt = np.asarray(a.valid[:, layout.slices()["p"]])
    np.testing.assert_array_equal(np.asarray(a.of("p"))[prompt], np.asarray(b.of("p"))[prompt])
    for name in ("i", "c"):
        moved = jnp.abs(a.of(name) - b.of(name)).max(axis=-1)
        assert (moved[a.valid[:, layout.slices()[name]]] > 1e-4).all(), name


def test_image_tokens_see_their_own_span_and_nothing_later():
    graph, params = make()
    layout, view = row("bidirectional", "TimeToken")

    def image_row(values, token):
        shown = view.replace(inputs=view.inputs | {"i": values})
        return bind(graph, params).hidden({"t": (layout, shown)})["t"].of("i")[0, token].sum()

    grads = jnp.abs(jax.grad(image_row)(view.inputs["i"], 0))
    assert (grads[0].max(axis=-1) > 0).all() and (grads[1] == 0).all()
    other = view.replace(inputs=view.inputs | {"c": (view.inputs["c"] + 1) % VOCAB})
    a, b = (bind(graph, params).hidden({"t": (layout, v)})["t"].of("i") for v in (view, other))
    np.testing.assert_array_equal(a, b)


def test_tasks_of_one_length_share_a_pass_without_meeting():
    graph, params = make()
    layout, view = row("bidirectional", "TimeToken")
    other = Layout((Segment("s", "text", layout.length),))
    text = View({"s": jnp.ones((3, layout.length), jnp.int32)}, {}, {})
    net = bind(graph, params)
    joint = net.hidden({"a": (layout, view), "b": (other, text)})
    for name, alone in (("a", net.hidden({"a": (layout, view)})), ("b", net.hidden({"b": (other, text)}))):
        np.testing.assert_allclose(joint[name].sequence, alone[name].sequence, atol=1e-5)


@pytest.mark.parametrize("change", [{"remat": "full"}, {"remat": "names"}, {"remat": "dots"}, {"dtype": "bfloat16"}])
def test_remat_and_bfloat16_change_memory_not_meaning(change):
    layout, view = row("bidirectional", "TimeToken")

    def loss(graph, params):
        return (bind(graph, params).hidden({"t": (layout, view)})["t"].sequence.astype(jnp.float32) ** 2).mean()

    graph, params = make()
    value, grads = jax.value_and_grad(lambda p: loss(graph, p))(params)
    other, grads_other = jax.value_and_grad(lambda p: loss(make(**change)[0], p))(params)
    tolerance = 0.05 if "dtype" in change else 1e-5
    np.testing.assert_allclose(other, value, rtol=tolerance)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads_other))
    if "remat" in change:
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), grads, grads_other)


def test_positions_and_features_against_their_formulas():
    table = sincos_2d(16, 16, 2048)
    expected = {(1, 0): 0.84147, (1, 512): 0.54030, (1, 1024): 0.0, (1, 1536): 1.0}
    expected |= {(16, 0): 0.0, (16, 512): 1.0, (16, 1024): 0.84147, (16, 1536): 0.54030}
    for place, value in expected.items():
        assert table[place] == pytest.approx(value, abs=1e-5)
    features = timestep_features(jnp.asarray([1.0]))[0]
    np.testing.assert_allclose(features[jnp.array([0, 1, 128])], [0.5403, 0.5974, 0.8415], atol=1e-4)
    x = jax.random.normal(jax.random.key(0), (1, 2, 1, 8))
    position = jnp.asarray([[3], [7]])
    turned, moved = (rotate(x, rotary_angles(p, 8, 10_000.0)) for p in (position, position + 5))
    dot = lambda y: jnp.einsum("bshd,bthd->st", y, y)
    np.testing.assert_allclose(dot(turned), dot(moved), atol=1e-5)
    assert jnp.abs(dot(turned) - dot(x)).max() > 1e-2


@pytest.mark.parametrize(
    "change, match",
    [
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


def test_a_picture_that_is_understood_has_a_clean_time_token():
    """MonoFormer's `add_before_image_tokens` stands before every image; without a picture both are padding."""
    graph, params = make(vision_features=5)
    segments = (Segment("head", "text", 2), Segment("picture", "vision", 3), Segment("rest", "text", 2))
    layout, words = with_time_tokens(Layout(segments)), with_time_tokens(Layout((segments[0], segments[2])))
    assert [s.name for s in layout.segments] == ["head", "picture.time", "picture", "rest"] and words.length == 4
    rng = np.random.default_rng(0)
    ids, flags = rng.integers(0, VOCAB, (2, ROWS, 2)).astype(np.int32), np.ones((ROWS, 2), bool)
    encode = lambda values: values  # of images that are drawn: there is none
    text = {name: TokenField(ids[i], flags, flags) for i, name in enumerate(("head", "rest"))}
    picture = ImageField(rng.normal(size=(ROWS, 3, 5)).astype(np.float32), np.asarray([True, False]))
    view = clean_view(layout, jax.tree.map(jnp.asarray, text | {"picture": picture}), encode)
    net = bind(graph, params)
    embedded, hidden = net.embedded(layout, view), net.hidden({"t": (layout, view)})["t"]
    expected = net.conditioning.token(net.time(jnp.zeros((ROWS, 1))))
    np.testing.assert_array_equal(embedded[:, 2:3], expected)
    assert np.abs(np.asarray(expected)).max() > 0
    np.testing.assert_array_equal(hidden.valid, [[True] * 8, [True] * 2 + [False] * 4 + [True] * 2])
    alone = net.hidden({"t": (words, clean_view(words, jax.tree.map(jnp.asarray, text), encode))})["t"]
    kept = np.asarray(hidden.sequence)[1, [0, 1, 6, 7]]
    np.testing.assert_allclose(kept, np.asarray(alone.sequence)[1], atol=1e-5)
    assert np.abs(np.asarray(hidden.sequence)[0, 6:] - np.asarray(alone.sequence)[0, 2:]).max() > 1e-2
