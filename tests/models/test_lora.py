"""Adapters against the sum that they stand for."""

import re

import jax
import numpy as np
import pytest

from src.common.tree import flatten, joined
from src.models import lora
from src.models.model import STACKED, bind
from tests.helpers.models import make, row

SETTINGS = {"rank": 3, "alpha": 12.0, "targets": "attention/(q|v|out)|.*mlp/.*|modulation/.*"}
ADAPTED = [f"attention/{n}" for n in ("out", "q", "v")] + [f"mlp/{n}" for n in ("down", "gate", "up")]


class Leaves:
    """What is read block by block, from memory."""

    def __init__(self, leaves):
        self.shapes = self.leaves = jax.device_get(leaves)

    def blocks(self, path):
        return iter(self.leaves[path] if path.startswith(STACKED) else [self.leaves[path]])


def states(architecture, params):
    return bind(architecture, params).hidden({"t": row("bidirectional", "AdaLNPerLayer")})["t"].sequence


def test_merged_kernels_give_what_adapters_give_and_zeros_give_the_plain_model():
    """The plain tree is that of a model without adapters, path by path."""
    plain_architecture, plain = make("AdaLNPerLayer", mot=("mlp",))
    architecture, params = make("AdaLNPerLayer", mot=("mlp",), lora=SETTINGS)  # all tensors random, B too
    merged = lora.merge(params, SETTINGS["alpha"])
    assert flatten(merged).keys() == flatten(plain).keys()
    streamed = lora.Merged(Leaves(flatten(params)), SETTINGS["alpha"])
    assert streamed.shapes.keys() == flatten(merged).keys()
    for path, leaf in flatten(merged).items():
        found = np.stack(list(streamed.blocks(path)))
        np.testing.assert_allclose(found if path.startswith(STACKED) else found[0], leaf, atol=1e-6)
    stems = {p.removeprefix("trunk/layers/").rpartition("/")[0] for p in flatten(params) if lora.is_adapter(p)}
    assert sorted(stems) == ADAPTED, "no adapters on parts of their own or on what conditions a block"
    kernels = {p: leaf for p, leaf in flatten(params).items() if not lora.is_adapter(p)}
    zeros = {p: np.zeros_like(leaf) for p, leaf in flatten(params).items() if p.endswith(lora.B)}
    run = jax.jit(lambda p, *ours: (states(plain_architecture, p), *(states(architecture, each) for each in ours)))
    one, adapted, zero = map(np.asarray, run(merged, params, joined(params, zeros)))
    base = np.asarray(run(joined(kernels), params, params)[0])
    np.testing.assert_allclose(one, adapted, atol=2e-5)
    np.testing.assert_array_equal(zero, base)
    assert np.abs(base - adapted).max() > 0.1, "the adapters do nothing"
    table = lambda params: params["fields"]["text"]["embed"]["table"]["embedding"]
    np.testing.assert_array_equal(table(merged), table(params))


def test_the_rule_freezes_the_trunk_but_what_no_language_model_has():
    _, params = make("AdaLNPerLayer", mot=("mlp", "mlp_norm"), lora=SETTINGS)
    ((rule, value),) = lora.frozen(3)
    assert value == 0 and lora.frozen(0) == ()
    trained = {p for p in flatten(params) if p.startswith("trunk/") and not re.search(rule, p)}
    ours = {p for p in trained if not lora.is_adapter(p)}
    assert {p.split("/")[2] for p in ours} == {"mot", "modulation"} and len(trained - ours) == 2 * len(ADAPTED)
    assert not [p for p in flatten(params) if re.search(rule, p) and not p.startswith("trunk/")]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rank": -1}, r"rank=-1 and alpha=12.0; rank is 0 or more"),
        ({"alpha": 0.0}, "rank=3 and alpha=0.0; rank is 0 or more, alpha above 0"),
        ({"rank": 17}, "rank=17 is above 16, the rank of a whole attention/out"),
        ({"targets": "attn/q"}, "'attn/q' matches no layer; there are attention/k, attention/out, "),
        ({"targets": "("}, "'\\(' is no regular expression"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(ValueError, match=words):
        make(lora=SETTINGS | changes)
