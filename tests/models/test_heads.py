"""Heads against their formulas."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from src.common.tree import flatten
from src.interfaces import Field, FieldSpec, Head
from src.models.build import build_architecture
from src.models.heads.adaln import AdaLNHead
from src.models.heads.categorical import CategoricalHead
from src.models.heads.linear import LinearHead
from tests.helpers.published import reorder

WIDTH, IDS, PATCHES = 16, FieldSpec((6,), vocab=11), FieldSpec((2, 2), features=12)
HIDDEN = jax.random.normal(jax.random.key(0), (4, 6, WIDTH))
GUIDE = lambda output, t: output[2:] + 3 * (output[:2] - output[2:])


def make(cls, spec, outputs=None, **options):
    outputs = outputs or spec.vocab or spec.features
    return cls(width=WIDTH, spec=spec, outputs=outputs, rngs=nnx.Rngs(1), **options)


@pytest.mark.parametrize("cls", [CategoricalHead, LinearHead])
def test_ids_have_their_cross_entropy_and_are_chosen_from_guided_logits(cls):
    head = make(cls, IDS, init=1.0)
    assert isinstance(head, Head)
    target = jax.random.randint(jax.random.key(1), (4, 6), 0, 11)
    logits = HIDDEN @ head.linear.kernel[...]
    expected = optax.softmax_cross_entropy_with_integer_labels(logits, target)
    np.testing.assert_allclose(head.nll(HIDDEN, target, head.noise(jax.random.key(0), (4, 6))), expected, atol=1e-5)
    ids = head.sample(jax.random.key(2), HIDDEN[:, 0], GUIDE, lambda key, x: jnp.argmax(x, axis=-1))
    np.testing.assert_array_equal(ids, np.argmax(GUIDE(logits[:, 0], 1.0), axis=-1))
    assert set(nnx.to_pure_dict(nnx.state(make(CategoricalHead, IDS)))["linear"]) == {"kernel"}


def test_vectors_of_the_plain_head_are_their_mean():
    head = make(LinearHead, PATCHES, init=1.0)
    target = jax.random.normal(jax.random.key(1), (4, 6, 12))
    mean = HIDDEN @ head.linear.kernel[...] + head.linear.bias[...]
    np.testing.assert_allclose(head.nll(HIDDEN, target), ((mean - target) ** 2).mean(-1), rtol=1e-5)
    found = head.sample(jax.random.key(2), HIDDEN[:, 0], GUIDE, lambda key, x: x)
    np.testing.assert_allclose(found, GUIDE(mean[:, 0], 1.0), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"head\.name=linear"):
        make(LinearHead, FieldSpec((4,), vocab=5, features=3), outputs=3).nll(HIDDEN, target)


@pytest.mark.parametrize("ratio, unused", [(1, False), (2, False), (1, True)])
@pytest.mark.parametrize("order", ["crs", "rsc"])
def test_adaln_is_the_final_layer_of_dit(order, ratio, unused):
    """Value, then variance, each in the order of the input's features; one conditioning vector a row or a token."""
    options = {"init": 1.0, "adaln_init": 1.0, "order": order, "channels": 3, "unused_variance": unused}
    head = make(AdaLNHead, PATCHES, 12 * ratio, **options)
    assert isinstance(head, Head)
    assert head.linear.kernel.shape == (WIDTH, 24 if unused else 12 * ratio)
    cond = jax.random.normal(jax.random.key(3), (4, 6, WIDTH))
    for vectors in (cond, cond[:, :1]):
        shift, scale = jnp.split(jax.nn.silu(vectors) @ head.adaln.kernel[...], 2, axis=-1)
        centred = HIDDEN - HIDDEN.mean(-1, keepdims=True)
        x = centred / jnp.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * (1 + scale) + shift
        expected = x @ head.linear.kernel[...]
        if order == "rsc":
            expected = reorder(expected, 2, "rsc", "crs")
        np.testing.assert_allclose(head(HIDDEN, vectors), expected[..., : 12 * ratio], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    "cls, spec, options, match",
    [
        (AdaLNHead, PATCHES, {"order": "rsc"}, r"head\.channels=None"),
        (AdaLNHead, PATCHES, {"order": "rsc", "channels": 5}, r"head\.channels=5"),
        (AdaLNHead, PATCHES, {"order": "scr"}, r"head\.order='scr'"),
        (AdaLNHead, PATCHES, {"outputs": 24, "unused_variance": True}, r"head\.unused_variance=True"),
        (CategoricalHead, PATCHES, {}, r"head\.name=categorical"),
    ],
)
def test_refusals(cls, spec, options, match):
    with pytest.raises(ValueError, match=match):
        make(cls, spec, **options)


def test_a_tied_head_is_the_table_of_the_embedding():
    """One leaf for both, whatever rows it has behind those of the head; a change of it changes both."""
    groups = {"text": {"embed": {"name": "tokens"}, "head": {"name": "categorical", "tied": True, "chunk": 4}}}
    words = {"text": Field("text", IDS, None)}
    model = {"dtype": "float32", "trunk": {"width": WIDTH, "depth": 1, "heads": 2}, "conditioning": {}, "time": {}}
    architecture, init = build_architecture(model, groups, words)
    params = jax.jit(init)(jax.random.key(0))
    assert {path: leaf.shape for path, leaf in flatten(params["fields"]).items()} == {
        "text/embed/table/embedding": (11, WIDTH)
    }
    table = np.asarray(params["fields"]["text"]["embed"]["table"]["embedding"])
    target = jnp.asarray(np.random.default_rng(0).integers(0, 11, (4, 6)))
    run = jax.jit(
        lambda p: (architecture.bind(p).field("text")(HIDDEN), architecture.bind(p).field("text").nll(HIDDEN, target))
    )
    logits, nll = run(params)
    np.testing.assert_allclose(logits, HIDDEN @ table.T, atol=1e-5)
    np.testing.assert_allclose(
        nll, optax.softmax_cross_entropy_with_integer_labels(HIDDEN @ table.T, target), atol=1e-5
    )
    grown = nnx.Embed(13, WIDTH, rngs=nnx.Rngs(0))
    assert make(CategoricalHead, IDS, tied=True, table=grown)(HIDDEN).shape == (4, 6, 11)
    del groups["text"]["embed"]
    with pytest.raises(ValueError, match=r"fields.text.head.tied needs a table of ids to share"):
        build_architecture(model, groups, words)
