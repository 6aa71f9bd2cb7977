"""Paths, counts and first-match rules."""

import jax
import numpy as np
import optax
import pytest

from src.common import tree

TREE = {"layers": {"mlp": {"kernel": np.zeros((2, 3)), "bias": np.zeros(3)}}, "embed": np.zeros((5, 2))}


def test_flat_and_back():
    flat = tree.flatten(TREE)
    assert list(flat) == ["embed", "layers/mlp/bias", "layers/mlp/kernel"]
    assert jax.tree.structure(tree.unflatten(flat)) == jax.tree.structure(TREE)
    assert tree.unflatten(flat)["layers"]["mlp"]["kernel"] is TREE["layers"]["mlp"]["kernel"]
    assert tree.count_parameters(jax.eval_shape(lambda: TREE)) == 19
    state = optax.adam(0.1).init(TREE)
    assert "0/mu/layers/mlp/bias" in tree.flatten(state)
    again = tree.rebuild(dict(reversed(tree.flatten(state).items())), state)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(state), strict=True))


def test_ambiguous_paths_are_refused():
    with pytest.raises(ValueError, match="slash"):
        tree.flatten({"a": {"b": 1}, "a/b": 2})
    with pytest.raises(ValueError, match="a are leaves and parents"):
        tree.unflatten({"a/b": 1, "a": 2})
    with pytest.raises(ValueError, match="differ at b, c"):
        tree.rebuild({"a": 1, "b": 2}, {"a": 0, "c": 0})


def test_first_rule_wins_and_every_path_and_rule_counts():
    paths = list(tree.flatten(TREE))
    chosen = tree.match_rules(paths, [("bias$", 0.0), ("^layers/", 0.1), ("embed", 0.2)])
    assert chosen == {"embed": 0.2, "layers/mlp/bias": 0.0, "layers/mlp/kernel": 0.1}
    with pytest.raises(ValueError, match=r"^decay rules do not cover embed, layers/mlp/kernel: add a rule"):
        tree.match_rules(paths, [("bias", 0)], "decay rules")
    with pytest.raises(ValueError, match=r"decide nothing: norm;"):
        tree.match_rules(paths, [("norm", 0), (".*", 1)])
    with pytest.raises(ValueError, match=r"decide nothing: bias;.*first match wins"):
        tree.match_rules(paths, [(".*", 1), ("bias", 0)])
    with pytest.raises(ValueError, match="does not compile"):
        tree.match_rules(paths, [("(", 0)])
    with pytest.raises(ValueError, match=r"p7 and 12 more"):
        tree.match_rules([f"p{i}" for i in range(20)], [])
