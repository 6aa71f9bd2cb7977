"""Parts of a block that the tokens of some fields have for themselves, against the same parts token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from src.common.tree import flatten, joined
from src.interfaces import Batch, View
from src.models import mixture_of_transformers as mot
from src.models.model import bind
from src.models.transformer import Transformer
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from tests.helpers.models import ROWS, make, row, tokens

VIEW = row("bidirectional", "TimeToken")
IMAGE = np.array([False] * 3 + [True] * 5 + [False] * 3)
SOME = ("mlp_norm", "mlp")


def hidden(architecture, params, **views):
    return {name: h.sequence for name, h in bind(architecture, params).hidden(views or {"t": VIEW}).items()}


@pytest.mark.parametrize(
    "kinds",
    [IMAGE, ~IMAGE, IMAGE | True, IMAGE & False, np.stack([IMAGE, IMAGE, ~IMAGE, IMAGE & False]),
     np.random.default_rng(0).random((4, 11)) < 0.5],
    ids=["row", "turned", "all", "none", "rows", "any"],
)  # fmt: skip
def test_every_token_gets_its_own_part_once(kinds):
    """The numpy way, which gives each part its own tokens only, and the traced way, against one token at a time."""
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 11, 2, 3)), jnp.float32)
    own, other, seen = jnp.arange(1.0, 4), jnp.arange(4.0, 7), []

    def part(weight):
        def function(x):
            seen.append(x.size // 6)
            return jnp.sin(x * weight)

        return function

    def total(x, own, other, kinds):
        return mot.by_kind(part(own), part(other), kinds, x)

    expected = np.where(np.broadcast_to(kinds, (4, 11))[..., None, None], np.sin(x * other), np.sin(x * own))

    def both(kinds):
        value, pull = jax.vjp(lambda *a: total(*a, kinds), x, own, other)
        return value, *pull(x + 1)

    known = jax.jit(lambda: both(kinds))()
    assert sum(seen) == 44, "a token went through both parts"
    np.testing.assert_allclose(known[0], expected, atol=1e-6)
    for a, b in zip(known, jax.jit(both)(jnp.asarray(kinds)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_own_parts_start_as_the_shared_ones_and_text_alone_never_meets_them():
    """Of all parts; filled ones give the plain model, others change images and what follows them. Images alone get
    what the plain model gives whose parameters are the own ones."""
    plain, _ = make()
    architecture, params = make(mot=mot.PARTS)
    base = joined({p: leaf for p, leaf in flatten(params).items() if not mot.is_copy(p)})
    length = VIEW.layout.length
    text = View(Batch({"text.s": tokens(jnp.ones((3, length), jnp.int32))}), FixedLayout((Segment("text.s", length),)))
    views = {"t": VIEW, "s": text}  # one pass: rows of two layouts
    alone = {"i": VIEW.replace(layout=VIEW.layout.only(lambda s: s.name == "image"))}
    turned = joined(
        base,
        {mot.original(p): leaf for p, leaf in flatten(params).items() if mot.is_copy(p)},
    )

    @jax.jit
    def run(base, turned, filled, params):
        found = [hidden(g, p, **views) for g, p in ((plain, base), (architecture, filled), (architecture, params))]
        return *found, hidden(plain, turned, **alone)["i"], hidden(architecture, params, **alone)["i"]

    expected, filled, moved, apart, same = jax.device_get(run(base, turned, mot.filled(params), params))
    np.testing.assert_allclose(same, apart, atol=2e-5)
    for name in views:
        np.testing.assert_allclose(filled[name], expected[name], atol=1e-6)
    np.testing.assert_array_equal(moved["s"], filled["s"])
    np.testing.assert_array_equal(moved["t"][:, :2], filled["t"][:, :2])
    changed = np.abs(moved["t"] - filled["t"]).max(-1)
    assert (changed[:, 3:8] > 1e-3).all() and changed[0, 8] > 1e-4
    paths = {p.removeprefix(mot.PREFIX) for p in flatten(params) if mot.is_copy(p)}
    assert {p.removeprefix("trunk/layers/") for p in flatten(base) if p.startswith("trunk/layers/")} == paths


@pytest.mark.faults
def test_a_fresh_trunk_starts_as_the_plain_one():
    def fresh(names):
        trunk = Transformer(8, 1, 2, mlp_width=8, qk_norm=True, mot=names, rngs=nnx.Rngs(5))
        return {"trunk": nnx.to_pure_dict(nnx.split(trunk)[1])}

    plain, params = jax.device_get(jax.jit(lambda: (fresh(()), fresh(mot.PARTS)))())
    jax.tree.map(np.testing.assert_array_equal, params, jax.device_get(mot.filled(joined(params, plain))))
    assert np.std(params["trunk"]["layers"]["mot"]["mlp"]["up"]["kernel"]) > 0


@pytest.mark.faults
def test_no_gradient_crosses_to_the_other_kind():
    """In the last block, whose feed-forward network nothing reads but the tokens that it acts on."""
    architecture, params = make(mot=SOME, depth=1)

    @jax.jit
    def grads_of(params):
        _, pull = jax.vjp(lambda p: hidden(architecture, p)["t"], params)
        return [pull(jnp.broadcast_to((kind == IMAGE)[:, None], (ROWS, 11, 16)) * 1.0)[0] for kind in (False, True)]

    for kind, grads in zip((False, True), map(flatten, jax.device_get(grads_of(params))), strict=True):
        for part in SOME:
            for prefix, own in (("trunk/layers/", not kind), (mot.PREFIX, kind)):
                found = [np.abs(g).max() for p, g in grads.items() if p.startswith(f"{prefix}{part}/")]
                assert found and all((x > 0) == own for x in found), (kind, part, prefix, found)


@pytest.mark.faults  # the plain model's is in test_model.py
def test_prefill_and_decode_equal_the_full_forward():
    architecture, params = make(mot=mot.PARTS)

    def cached(params):
        net, parts = bind(architecture, params), []
        full, cache, spec = net.hidden({"t": VIEW})["t"], net.start_cache(VIEW), VIEW.layout.spec(VIEW.batch)
        for segment in VIEW.layout.segments:
            copy = "noisy" if segment.role == "noisy" else "clean"
            found, cache = net.extend(VIEW, segment, copy, 0, segment.length, spec, cache)
            parts.append(found)
        expected = [full.of(segment.name) for segment in VIEW.layout.segments]
        return jnp.concatenate(parts, 1), jnp.concatenate(expected, 1)

    found, full = map(np.asarray, jax.jit(cached)(params))
    valid = np.concatenate([VIEW.batch.tokens[s.name].valid for s in VIEW.layout.segments], axis=1)
    np.testing.assert_allclose(found[valid], full[valid], atol=2e-5)


@pytest.mark.parametrize("name, calls", [("image", {"own"}), ("text.c", {"shared"})])
def test_sampling_runs_the_part_of_its_tokens_alone(monkeypatch, name, calls):
    """Which tokens have parts of their own is known before any data, also for some tokens of a segment."""
    architecture, params = make(mot=("mlp",))
    seen, by_kind = set(), mot.by_kind

    def watched(shared, own, kinds, x):
        spy = lambda label, part: lambda x: (seen.add(label), part(x))[1]
        return by_kind(spy("shared", shared), spy("own", own), kinds, x)

    monkeypatch.setattr(mot, "by_kind", watched)

    def step(params, start):
        net, segment = bind(architecture, params), VIEW.layout.segment(name)
        copy = "noisy" if segment.role == "noisy" else "clean"
        return net.extend(VIEW, segment, copy, start, 2, VIEW.layout.spec(VIEW.batch), net.start_cache(VIEW))[0]

    jax.eval_shape(step, params, jnp.asarray(1))
    assert seen == calls


@pytest.mark.parametrize("names", [("mpl",), ("mlp", "mlp")])
def test_refusals(names):
    with pytest.raises(ValueError, match=r"must be some of attention_norm, attention, mlp_norm, mlp, each at most"):
        make(mot=names)
