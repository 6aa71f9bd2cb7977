"""Trees of arrays as flat dictionaries of paths, and rules that choose a value for each path."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

Value = TypeVar("Value")
SHOWN = 8


def path_string(path: Sequence[Any]) -> str:
    """The key path of a leaf as `"a/b/0"`: dict keys, field names and positions, joined by slashes."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def flatten(tree: Any) -> dict[str, Any]:
    """Leaves by path, `{"a/b/c": leaf}`, in the order of `jax.tree.leaves`.

    Raises ValueError when two leaves share a path (a key that itself contains a slash).
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    flat = {path_string(path): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the tree have the same path: rename the keys that contain a slash")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten` for nested dictionaries: `{"a/b": x}` becomes `{"a": {"b": x}}`.

    Raises ValueError when a path is both a leaf and the parent of another one.
    """
    tree: dict[str, Any] = {}
    parents = {path.rsplit("/", depth)[0] for path in flat for depth in range(1, path.count("/") + 1)}
    clashes = sorted(parents & set(flat))
    if clashes:
        raise ValueError(f"the paths {listed(clashes)} are leaves and parents of other leaves at once")
    for path, leaf in flat.items():
        *outer, last = path.split("/")
        node = tree
        for key in outer:
            node = node.setdefault(key, {})
        node[last] = leaf
    return tree


def rebuild(flat: Mapping[str, Any], like: Any) -> Any:
    """A tree of the same structure as `like` (any pytree) with the leaves of `flat`.

    Raises ValueError when the paths of `flat` and `like` differ.
    """
    paths = list(flatten(like))
    if set(paths) != set(flat):
        raise ValueError(f"the trees differ at {listed(sorted(set(paths) ^ set(flat)))}")
    return jax.tree.unflatten(jax.tree.structure(like), [flat[path] for path in paths])


def joined(*parts: Any) -> Any:
    """One nested dictionary with the leaves of several; where two have a leaf of one path, the later one's."""
    return unflatten({path: leaf for part in parts for path, leaf in flatten(part).items()})


def count_parameters(tree: Any) -> int:
    """The number of elements of all leaves (arrays or abstract arrays)."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def check_rules(rules: Any, what: str) -> None:
    """Raises ValueError, with `what` in front, unless these are pairs of a text and a value."""
    pairs = list(rules) if isinstance(rules, list | tuple) else [rules]
    for rule in pairs:
        if not isinstance(rule, list | tuple) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(
                f"{what} contain {rule!r}: each rule is a pair (regex, value), as in (('trunk/', 0.0), ('.*', 1.0))"
            )


def match_rules(paths: Iterable[str], rules: Sequence[tuple[str, Value]], what: str = "the rules") -> dict[str, Value]:
    """The value of the first rule `(regex, value)` that `re.search` finds in each path.

    `what` names the rules in messages. Raises ValueError when a path has no rule, when a rule decides nothing (it
    matches no path, or only those that an earlier rule takes), when a rule is no pair and when a regular expression
    does not compile.
    """
    check_rules(rules, what)
    try:
        patterns = [re.compile(pattern) for pattern, _ in rules]
    except re.error as error:
        raise ValueError(f"{what} contain a regular expression that does not compile: {error}") from error
    chosen: dict[str, Value] = {}
    idle = set(range(len(patterns)))
    missing = []
    for path in paths:
        index = next((i for i, pattern in enumerate(patterns) if pattern.search(path)), None)
        if index is None:
            missing.append(path)
            continue
        idle.discard(index)
        chosen[path] = rules[index][1]
    if missing:
        raise ValueError(f"{what} do not cover {listed(missing)}: add a rule, for example a last one with '.*'")
    if idle:
        unused = [patterns[i].pattern for i in sorted(idle)]
        raise ValueError(
            f"{what} contain rules that decide nothing: {listed(unused)}; correct or remove them"
            " (the first match wins, so narrow rules go before wide ones)"
        )
    return chosen


def listed(items: Sequence[Any], shown: int = SHOWN) -> str:
    """The first items for a message, with a count of those left out."""
    text = ", ".join(str(item) for item in items[:shown])
    return text if len(items) <= shown else f"{text} and {len(items) - shown} more"


def split_rows(batch: Any, parts: int) -> Any:
    """[B, …] -> [parts, B / parts, …]; row i goes to part i mod parts, so that every device keeps its share of each."""

    def split(leaf: jax.Array) -> jax.Array:
        return jnp.moveaxis(leaf.reshape(leaf.shape[0] // parts, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(split, batch)


def join_rows(parts: Any) -> Any:
    """[parts, B / parts, …] -> [B, …], the inverse of `split_rows`."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:]), parts)
