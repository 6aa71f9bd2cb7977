"""Packed rows: every example gets what it gets alone in a row of fixed places, with losses and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.corruption.categorical import Categorical
from src.corruption.timesteps import Uniform
from src.interfaces import Batch, Packing, Tokens
from src.models.model import bind
from src.objectives.diffusion import Diffusion
from src.objectives.losses.squared_error import SquaredError
from src.objectives.next_token import NextToken
from src.sequence.layout import FixedLayout
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment
from src.train.system import clean_view
from tests.helpers.models import FEATURES, VOCAB, make, table, tokens

SLOTS, PARTS, PATCHES = 30, 3, 4
# A part is text of some length, an image, or one that is only read; both have a slot for a time token in front.
KINDS = {"a": (3, "image", 2), "b": (1, "image", 2, "vision", 1, "image", 1), "c": (1, "vision", 3)}
LENGTH = {"image": 1 + PATCHES, "vision": 1 + FEATURES[0]}
SHAPE = {"image": (4, 4, 1), "vision": FEATURES}
FIELDS = table()


def examples(rows):
    """By row, its examples: (kind, values by part)."""
    rng = np.random.default_rng(0)

    def part(size):
        if isinstance(size, int):
            return rng.integers(0, VOCAB, size).astype(np.int32)
        return rng.normal(size=SHAPE[size]).astype(np.float32)

    return [[(kind, [part(p) for p in KINDS[kind]]) for kind in row] for row in rows]


def packed(rows):
    """The batch of packed rows; an image slot that no example uses holds NaN."""
    shape = (len(rows), SLOTS)
    ids, there, segment = np.zeros(shape, np.int32), np.zeros(shape, bool), np.zeros(shape, np.int32)
    begins = {name: np.full((len(rows), PARTS), -1, np.int32) for name in SHAPE}
    values = {name: np.full((len(rows), PARTS, *size), np.nan, np.float32) for name, size in SHAPE.items()}
    for r, row in enumerate(rows):
        at, count = 0, dict.fromkeys(SHAPE, 0)
        for number, (kind, parts) in enumerate(row):
            first = at
            for size, part in zip(KINDS[kind], parts, strict=True):
                if isinstance(size, int):
                    ids[r, at : at + size], there[r, at : at + size] = part, True
                else:
                    begins[size][r, count[size]], values[size][r, count[size]] = at + 1, part
                    count[size] += 1
                at += LENGTH.get(size, size)
            segment[r, first:at] = number + 1
    batch = {"text": Tokens(ids, there, there)}
    for name, each in values.items():
        valid = np.repeat(begins[name][..., None] >= 0, FIELDS[name].spec.tokens, axis=-1)
        batch[name] = Tokens(each, valid, valid & (name == "image"))
    return jax.tree.map(jnp.asarray, Batch(batch, packing=Packing(segment, begins)))


def segment_of(size, name, mode):
    """The segment of a part."""
    if isinstance(size, int):
        return Segment(name, size)
    return Segment(name, PATCHES, mode, role="noisy") if size == "image" else Segment(name, FEATURES[0])


def static(kind, mode):
    """The layout of one example without padding: text.0, image.1, …"""
    names = [f"{'text' if isinstance(size, int) else size}.{i}" for i, size in enumerate(KINDS[kind])]
    return FixedLayout(tuple(segment_of(size, name, mode) for size, name in zip(KINDS[kind], names, strict=True)))


def document(mode):
    parts = tuple(segment_of(name, name, mode) for name in SHAPE)
    return PackedLayout((Segment("text", SLOTS), *parts), SLOTS, tuple((name, PARTS) for name in SHAPE))


def diffusion(name):
    return Diffusion((name,), SquaredError(), Uniform())


def next_token(net, hidden, *names):
    """The terms of next-token prediction of some names."""
    objective = NextToken(names)
    return objective.loss(net, hidden, objective.draw(jax.random.key(1), net.architecture.table, hidden.view))


def places(rows):
    """(row, first slot, number of the first image, kind, values) of every example."""
    for r, row in enumerate(rows):
        at = image = 0
        for kind, parts in row:
            yield r, at, image, kind, parts
            at += sum(LENGTH.get(size, size) for size in KINDS[kind])
            image += KINDS[kind].count("image")


def alone(net, kind, members, mode, timed, aux):
    """Hidden states `[examples, length, D]` and loss terms of all examples of a kind, in rows of their own."""
    layout = static(kind, mode).with_leads(lambda s: int(timed and s.name[:4] != "text"))
    values = [np.stack(column) for column in zip(*(parts for *_, parts in members), strict=True)]
    batch = {}
    for segment, value in zip(layout.segments, values, strict=True):
        flags = np.ones((len(value), segment.length), bool)
        batch[segment.name] = tokens(value, flags, flags & (segment.name[:6] != "vision"))
    view = clean_view(FIELDS, layout, Batch(batch))
    where = {}
    for i, size in enumerate(KINDS[kind]):
        if size == "image":
            number = KINDS[kind][:i].count("image")
            pick = np.asarray([r * PARTS + image + number for r, _, image, *_ in members])
            where[f"image.{i}"] = jax.tree.map(lambda a, pick=pick: a[pick], aux["image"])
    noisy, times = ({n: f(c) for n, c in where.items()} for f in (lambda c: c.xt, lambda c: 1000.0 * c.t))
    hidden = net.hidden({"t": view.replace(noisy=noisy, times=times)})["t"]
    terms = [diffusion(name).loss(net, hidden, {name: kept}) for name, kept in where.items()]
    terms.append(next_token(net, hidden, *(name for name in batch if name.startswith("text"))))
    return hidden.sequence, terms


def total(terms, name):
    found = [t[name] for t in terms if name in t]
    return sum(t.total for t in found), sum(t.count for t in found)


def noised_words():
    """Rows of the table whose words are noised, too, and told their time."""
    words = FIELDS["text"].spec
    return FIELDS | {"text": dataclasses.replace(FIELDS["text"], process=Categorical(field=words))}


@pytest.mark.parametrize(
    "conditioning, own, noised",
    [
        ("TimeToken", ("text",), False),
        pytest.param("AdaLNPerLayer", ("text", "vision"), True, marks=pytest.mark.faults),
        pytest.param("TimeToken", ("text", "image"), False, marks=pytest.mark.faults),
        pytest.param("AdaLNPerLayer", ("image",), True, marks=pytest.mark.faults),
        pytest.param("AdaLNBeforeTrunk", (), True, marks=pytest.mark.faults),
    ],
)
def test_words_between_the_parts_may_have_parts_of_the_trunk_and_a_time(conditioning, own, noised):
    """What fills the row is conditioned and routed as in a row of fixed places; the parts between keep their own."""
    fields = noised_words() if noised else FIELDS
    architecture, params = make(conditioning, rows=lambda: fields, mot=("mlp",) if own else ())
    net = bind(dataclasses.replace(architecture, own=own), params)
    lead, role = int(conditioning == "TimeToken"), "noisy" if noised else "clean"
    rows = examples(("b", "b"))
    inner = tuple(segment_of(name, name, "bidirectional") for name in SHAPE)
    layout = PackedLayout((Segment("text", SLOTS, role=role), *inner), SLOTS, tuple((n, PARTS) for n in SHAPE))
    clean = clean_view(fields, layout.with_leads(lambda s: lead), packed(rows))
    image = Diffusion(("image",), SquaredError(), Uniform())
    view, aux = image.prepare(net, clean, image.draw(jax.random.key(0), fields, clean))
    times = jnp.asarray([[700.0], [100.0]])
    if noised:
        words = clean.batch.tokens["text"].value
        view = view.replace(noisy=view.noisy | {"text": words}, times=view.times | {"text": times})
    hidden = jax.jit(lambda view: net.hidden({"t": view})["t"].sequence)
    found = hidden(view)

    segments, batch, noisy, told = [], {}, {}, {}
    for i, size in enumerate(KINDS["b"]):
        name = f"{'text' if isinstance(size, int) else size}.{i}"
        segment = segment_of(size, name, "bidirectional")
        if isinstance(size, int):
            segment = Segment(name, size, role=role)
        segments.append(segment)
        batch[name] = tokens(np.stack([row[0][1][i] for row in rows]), np.ones((2, segment.length), bool))
        if size == "image":
            number = KINDS["b"][:i].count("image")
            pick = np.asarray([number, PARTS + number])
            noisy[name], told[name] = aux["image"].xt[pick], 1000.0 * aux["image"].t[pick]
        elif isinstance(size, int) and noised:
            noisy[name], told[name] = batch[name].value, times
    alone = FixedLayout(tuple(segments)).with_leads(lambda s: lead * (s.name[:4] != "text"))
    expected = clean_view(fields, alone, Batch(batch)).replace(noisy=noisy, times=told)
    expected = hidden(expected)
    slots, at = [], 0
    for size in KINDS["b"]:
        count = LENGTH.get(size, size)
        slots += range(at + (size in LENGTH and not lead), at + count)
        at += count
    np.testing.assert_allclose(found[:, np.asarray(slots)], expected, atol=2e-5)
    if noised:
        moved = hidden(view.replace(times=view.times | {"text": times + 200}))
        assert np.abs(moved - found)[:, 0].max() > 1e-3


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
    architecture, params = make(conditioning)
    rows, timed = examples(kinds), conditioning == "TimeToken"
    layout = document(mode).with_leads(lambda s: int(timed))
    clean = clean_view(FIELDS, layout, packed(rows))
    draws = diffusion("image").draw(jax.random.key(0), FIELDS, clean)
    assert draws["times"].shape == (len(rows), PARTS, 1)
    view, aux = diffusion("image").prepare(bind(architecture, params), clean, draws)
    assert np.isfinite(view.noisy["image"]).all() and view.times["image"].shape == (len(rows), PARTS)

    def together(params):
        net = bind(architecture, params)
        hidden = net.hidden({"t": view})["t"]
        terms = [diffusion("image").loss(net, hidden, aux), next_token(net, hidden, "text")]
        (mse, patches), (nll, words) = total(terms, "mse"), total(terms, "nll")
        return mse + nll, (hidden.sequence, mse, patches, nll, words)

    def apart(params):
        net = bind(architecture, params)
        states, terms = {}, []
        for kind in sorted({*"".join(kinds)}):
            members = [e for e in places(rows) if e[3] == kind]
            states[kind], found = alone(net, kind, members, mode, timed, aux)
            terms += found
        (mse, patches), (nll, words) = total(terms, "mse"), total(terms, "nll")
        return mse + nll, (states, mse, patches, nll, words)

    if gradients:
        (_, found), grads = jax.jit(jax.value_and_grad(together, has_aux=True))(params)
        (_, expected), other = jax.jit(jax.value_and_grad(apart, has_aux=True))(params)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5), grads, other)
        moved = [grads["fields"]["image"], grads["fields"]["vision"], grads["time"]]
        assert all(np.abs(a).max() > 0 for a in jax.tree.leaves(moved))
    else:
        (_, found), (_, expected) = jax.jit(together)(params), jax.jit(apart)(params)
    np.testing.assert_allclose(found[1:], expected[1:], rtol=1e-5)
    assert found[2] == PATCHES * sum(row.count("a") + 2 * row.count("b") for row in kinds)
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
