"""Parts of a block that the tokens of some fields have of their own (mixture of transformers, Liang et al. 2024, arXiv
2411.04996; with the language model's own parts frozen, LMFusion, Shi et al. 2024, arXiv 2412.15188).

Attention stays one for all tokens; norms, the feed-forward network and the projections of attention may be chosen by
the token's field. The own parts start equal to the shared ones, so the first step is that of the plain model.

Which tokens have their own follows from the layout and is numpy, known before any data: rows are cut into runs of one
kind, each part sees its own runs only, and a block costs what a plain one does. Where the kinds are traced, or
`context` splits the sequence, both parts see all tokens and a `where` chooses.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Shaped

from src.common import tree
from src.common.mesh.constraints import automatic_axes
from src.interfaces import PyTree

PARTS = ("attention_norm", "attention", "mlp_norm", "mlp")
GROUP = "mot"  # of a block: `trunk/layers/mot/mlp/up/kernel` is the own `trunk/layers/mlp/up/kernel` of some tokens
PREFIX = f"trunk/layers/{GROUP}/"

Kinds = Bool[Array, "*R S"] | Bool[np.ndarray, "*R S"] | None  # whether a token has own parts; None: none has


class OwnParts(nnx.Module):
    """Copies of some parts of a block, under the names that they have there. Takes no random numbers."""

    def __init__(self, block: nnx.Module, names: Sequence[str]):
        for name in names:
            setattr(self, name, nnx.clone(getattr(block, name)))


def check_parts(names: Sequence[str]) -> tuple[str, ...]:
    """The names, as a tuple. Raises ValueError for one that no block has a part for, or that is there twice."""
    names = (names,) if isinstance(names, str) else tuple(names)
    unknown = [name for name in names if name not in PARTS]
    if unknown or len(set(names)) < len(names):
        raise ValueError(f"model.trunk.mot={names!r} must be some of {', '.join(PARTS)}, each at most once")
    return names


def part(shared: nnx.Module, own: nnx.Module | None, name: str, kinds: Kinds) -> Callable[[Array], Array]:
    """The part `name` as a function of all tokens `[B, S, …]`: that of `shared`, and of `own` for the tokens that have
    their own. The part itself must act on each token alone."""
    common, special = getattr(shared, name), getattr(own, name, None)
    return common if special is None or kinds is None else functools.partial(by_kind, common, special, kinds)


def by_kind(
    shared: Callable[[Array], Array], own: Callable[[Array], Array], kinds: Any, x: Shaped[Array, "B S *D"]
) -> Shaped[Array, "B S *E"]:
    """own(x) at the tokens of these kinds, shared(x) at the others."""
    if not isinstance(kinds, np.ndarray) or "context" in automatic_axes():
        kinds = jnp.broadcast_to(kinds, x.shape[:2])
        chosen, other = own(x), shared(x)
        return jnp.where(kinds.reshape(*x.shape[:2], *[1] * (chosen.ndim - 2)), chosen, other)
    if kinds.all() or not kinds.any():
        return own(x) if kinds.any() else shared(x)
    blocks = cut(kinds)
    alike = len(blocks) == 1  # then the axis of rows, which a mesh may split, stays as it is
    flat = lambda a: a if alike else a.reshape(-1, *a.shape[2:])
    done: dict[bool, Iterator[Array]] = {}
    for kind, function in ((False, shared), (True, own)):
        mine = [flat(x[rows, slots]) for rows, runs in blocks for slots, of in runs if of == kind]
        ends = np.cumsum([piece.shape[alike] for piece in mine])[:-1]
        done[kind] = iter(jnp.split(function(jnp.concatenate(mine, axis=int(alike))), ends, axis=int(alike)))

    def row(rows: slice, runs: list[tuple[slice, bool]]) -> Array:
        size = len(range(*rows.indices(x.shape[0])))
        pieces = [(slots.stop - slots.start, next(done[kind])) for slots, kind in runs]
        return jnp.concatenate([a.reshape(size, n, *a.shape[2 if alike else 1 :]) for n, a in pieces], axis=1)

    return jnp.concatenate([row(rows, runs) for rows, runs in blocks])


def cut(kinds: Bool[np.ndarray, "*B S"]) -> list[tuple[slice, list[tuple[slice, bool]]]]:
    """Neighbouring rows that are alike, and of each such block its runs of neighbouring tokens with their kind."""
    table = np.atleast_2d(kinds)
    blocks = [(rows, table[rows.start]) for rows in _runs(table)]
    whole = kinds.ndim == 1  # one row that stands for all
    return [(slice(None) if whole else rows, [(s, bool(row[s.start])) for s in _runs(row)]) for rows, row in blocks]


def _runs(values: np.ndarray) -> list[slice]:
    """Slices of equal neighbours along the first axis."""
    starts = [0, *(i for i in range(1, len(values)) if np.any(values[i] != values[i - 1]))]
    return [slice(i, j) for i, j in zip(starts, [*starts[1:], len(values)], strict=True)]


def filled(params: PyTree, only: Container[str] | None = None) -> PyTree:
    """The parameters with every copy (or those of the paths `only`) equal to what it is a copy of.

    For weights of a plain model, which have no copies; trees without copies come back as they are.
    """
    flat = tree.flatten(params)
    chosen = [path for path in flat if is_copy(path) and (only is None or path in only)]
    return tree.rebuild(flat | {path: jnp.copy(flat[original(path)]) for path in chosen}, params)


def is_copy(path: str) -> bool:
    """Whether the parameter of this path belongs to a copy."""
    return path.startswith(PREFIX)


def original(path: str) -> str:
    """The path of what a copy was copied from."""
    return path.replace(PREFIX, "trunk/layers/", 1)
