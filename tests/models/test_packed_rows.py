"""Packed rows: every example gets what it gets alone in a row of a static layout, with losses and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.interfaces import ImageField, PlaceField, TokenField
from src.models.build import Fields, build_model
from src.models.model import bind
from src.objectives.diffusion import Diffusion
from src.objectives.next_token import NextToken
from src.sequence.layout import Layout, Segment
from src.sequence.packed import Document
from src.sequence.view import clean_view

SLOTS, IMAGES, PATCHES, FEATURES = 30, 3, 4, (3, 5)
# A part is text of some length, an image `g`, or one that is understood; both have a slot for a time token in front.
KINDS = {"a": (3, "g", 2), "b": (1, "g", 2, "p", 1, "g", 1), "c": (1, "p", 3)}
LENGTH = {"g": 1 + PATCHES, "p": 1 + FEATURES[0]}
VOCAB = 11


def make(conditioning):
    """(graph, params) of a small model of random numbers, made without running its initializers."""
    config = {"dtype": "float32", "conditioning": {"name": f"conditioning:{conditioning}"}}
    config["trunk"] = {"width": 16, "depth": 2, "heads": 4, "kv_heads": 2, "mlp_width": 24, "qk_norm": True}
    config |= {group: {} for group in ("time", "text", "text_head", "image", "image_head", "labels", "vision")}
    build = lambda: nnx.split(build_model(config, Fields(VOCAB, 4, 1, (2, 2), None, FEATURES[1]), nnx.Rngs(0)))
    graph, state = nnx.eval_shape(build)
    rng = np.random.default_rng(0)
    return graph, jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape) / 3, a.dtype), nnx.to_pure_dict(state))


encode = lambda values: values.reshape(len(values), PATCHES, -1)


def examples(rows):
    """By row, its examples: (kind, tokens by part, images [h, w, C] by part)."""
    rng = np.random.default_rng(0)

    def part(size):
        if isinstance(size, int):
            return rng.integers(0, VOCAB, size).astype(np.int32)
        return rng.normal(size=(4, 4, 1) if size == "g" else FEATURES).astype(np.float32)

    return [[(kind, [part(p) for p in KINDS[kind]]) for kind in row] for row in rows]


def packed(rows):
    """The batch of packed rows; an image slot that no example uses holds NaN."""
    shape = (len(rows), SLOTS)
    ids, valid, loss = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, bool)
    segment, begins = np.zeros(shape, np.int32), {k: np.full((len(rows), IMAGES), -1, np.int32) for k in "gp"}
    values = {k: np.full((len(rows), IMAGES, *s), np.nan, np.float32) for k, s in (("g", (4, 4, 1)), ("p", FEATURES))}
    for r, row in enumerate(rows):
        at, count = 0, {"g": 0, "p": 0}
        for number, (kind, parts) in enumerate(row):
            first = at
            for size, part in zip(KINDS[kind], parts, strict=True):
                if isinstance(size, int):
                    ids[r, at : at + size], valid[r, at : at + size], loss[r, at : at + size] = part, True, True
                else:
                    begins[size][r, count[size]], values[size][r, count[size]] = at + 1, part
                    count[size] += 1
                at += LENGTH.get(size, size)
            segment[r, first:at] = number + 1
    names = {"g": "image", "p": "picture"}
    fields = {name: ImageField(values[k], begins[k] >= 0) for k, name in names.items()}
    places = PlaceField(segment, {name: begins[k] for k, name in names.items()})
    return jax.tree.map(jnp.asarray, fields | {"text": TokenField(ids, valid, loss), "places": places})


def static(kind, mode):
    """The layout of one example without padding."""
    segments = []
    for i, size in enumerate(KINDS[kind]):
        images = {
            "g": Segment(f"image{i}", "image", PATCHES, mode),
            "p": Segment(f"picture{i}", "vision", FEATURES[0]),
        }
        segments.append(images.get(size) or Segment(f"text{i}", "text", size))
    return Layout(tuple(segments))


def document(mode):
    image = Segment("image", "image", PATCHES, mode)
    picture = Segment("picture", "vision", FEATURES[0])
    return Document((Segment("text", "text", SLOTS), image, picture), slots=SLOTS)


def objective(field):
    return Diffusion(
        field,
        process=Gaussian(Linear(), "velocity"),
        times=lambda k, s: jax.random.uniform(k, s),
        weight=lambda *a: jnp.ones(()),
    )


def places(rows):
    """(row, first slot, number of the first image, kind, parts) of every example."""
    for r, row in enumerate(rows):
        at = image = 0
        for kind, parts in row:
            yield r, at, image, kind, parts
            at += sum(LENGTH.get(size, size) for size in KINDS[kind])
            image += KINDS[kind].count("g")


@pytest.mark.parametrize(
    "conditioning, mode, kinds, gradients",
    [
        ("TimeToken", "bidirectional", ("b", "aa"), False),
        pytest.param("TimeToken", "bidirectional", ("ac", "ba", "cb"), True, marks=pytest.mark.faults),
        pytest.param("AdaLNPerLayer", "causal", ("ac", "ba", "cb"), True, marks=pytest.mark.faults),
        pytest.param("AdaLNBeforeTrunk", "bidirectional", ("ac", "ba", "cb"), True, marks=pytest.mark.faults),
    ],
)
def test_every_example_gets_what_it_gets_alone(conditioning, mode, kinds, gradients):
    graph, params = make(conditioning)
    rows, key = examples(kinds), jax.random.key(0)
    timed = conditioning == "TimeToken"
    layout = document(mode).timed() if timed else document(mode)
    batch = packed(rows)
    prepare = lambda batch, key: objective("image").prepare(clean_view(layout, batch, encode), batch, key, True)
    view, aux = jax.jit(prepare)(batch, key)
    assert np.isfinite(view.inputs["image"]).all() and view.times["image"].shape == (len(rows), IMAGES)

    def alone(net, kind, members):
        """Hidden states `[examples, length, D]` and loss terms of all examples of a kind, in their static layout."""
        one = static(kind, mode).timed() if timed else static(kind, mode)
        fields, terms = {}, []
        for segment, *values in zip(static(kind, mode).segments, *(parts for *_, parts in members), strict=True):
            values = np.stack(values)
            flags = np.ones(values.shape, bool)
            text = segment.kind == "text"
            fields[segment.name] = TokenField(values, flags, flags) if text else ImageField(values)
        fields = jax.tree.map(jnp.asarray, fields)
        shown = clean_view(one, fields, encode)
        where = {}
        for i in (i for i, size in enumerate(KINDS[kind]) if size == "g"):
            number = KINDS[kind][:i].count("g")
            pick = tuple(np.asarray([(r, image + number) for r, _, image, *_ in members]).T)
            where[f"image{i}"] = _, noised, t = jax.tree.map(lambda a, pick=pick: a[pick], aux)
            inputs, times = {f"image{i}": noised.xt}, {f"image{i}": 1000.0 * t}
            shown = shown.replace(inputs=shown.inputs | inputs, times=shown.times | times)
        hidden = net.hidden({"t": (one, shown)})["t"]
        terms = [objective(name).loss(net, hidden, fields, kept) for name, kept in where.items()]
        terms.append(NextToken(tuple(n for n in fields if n.startswith("text"))).loss(net, hidden, fields, None))
        return hidden.sequence, terms

    def total(terms, name):
        found = [t[name] for t in terms if name in t]
        return sum(t.total for t in found), sum(t.count for t in found)

    def together(params):
        net = bind(graph, params)
        hidden = net.hidden({"t": (layout, view)})["t"]
        terms = [objective("image").loss(net, hidden, batch, aux), NextToken(("text",)).loss(net, hidden, batch, None)]
        (mse, images), (nats, tokens) = total(terms, "mse"), total(terms, "nats")
        return mse + nats, (hidden.sequence, mse, images, nats, tokens)

    def apart(params):
        net = bind(graph, params)
        states, terms = {}, []
        for kind in sorted({*"".join(kinds)}):
            states[kind], found = alone(net, kind, [e for e in places(rows) if e[3] == kind])
            terms += found
        (mse, images), (nats, tokens) = total(terms, "mse"), total(terms, "nats")
        return mse + nats, (states, mse, images, nats, tokens)

    if gradients:
        (_, found), grads = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
        (_, expected), other = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, other)
        assert all(np.abs(a).max() > 0 for a in jax.tree.leaves([grads[k] for k in ("image", "time", "vision")]))
    else:
        (_, found), (_, expected) = jax.jit(together)(params), jax.jit(apart)(params)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
    assert found[2] == sum(row.count("a") + 2 * row.count("b") for row in kinds)
    assert found[4] == sum(5 * row.count("a") + 5 * row.count("b") + 4 * row.count("c") - len(row) for row in kinds)
    seen = dict.fromkeys(KINDS, 0)
    for r, at, _, kind, _ in places(rows):
        slots, slot = [], at
        for size in KINDS[kind]:
            count = LENGTH.get(size, size)
            slots += list(range(slot + (size in LENGTH and not timed), slot + count))
            slot += count
        np.testing.assert_allclose(found[0][r, np.asarray(slots)], expected[0][kind][seen[kind]], atol=1e-5)
        seen[kind] += 1
