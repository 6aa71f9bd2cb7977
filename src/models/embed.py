"""Rows for the trunk: the condition of each token, tasks stacked, padding for a mesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from src.interfaces import Batch, Layout, SequenceSpec, row_of
from src.models.conditioning import Condition


class Embedded(NamedTuple):
    """A row-batch ready for the trunk, and by name the vectors that condition its heads."""

    x: Float[Array, "B S D"]
    spec: SequenceSpec
    condition: Condition
    vectors: dict[str, Array]


def conditions(
    layout: Layout, batch: Batch, x: Float[Array, "B S D"], vectors: dict[tuple[str, str], Array], own: tuple[str, ...]
) -> Condition:
    """All conditioning vectors of the rows, and which of them each token belongs to.

    vectors   by name and copy, [B, T, D]: one a row, one a token, or one for each part of packed rows
    own       fields whose tokens have parts of the trunk of their own
    """
    owners, first = _everywhere(layout, batch, lambda segment: -1), 0
    for (name, copy), vector in vectors.items():
        length, times = layout.segment(name).length, vector.shape[1]
        index = np.arange(times)[:, None] if owners[name, copy].ndim > 1 else np.arange(length) * times // length
        owners[name, copy] = first + np.broadcast_to(index, owners[name, copy].shape)
        first += times
    if not vectors:
        vector, owner = jnp.zeros_like(x[:, :1]), np.full(layout.length, -1, np.int32)
    else:
        vector = jnp.concatenate(list(vectors.values()), axis=1)
        owner = layout.join(batch, owners, fill=-1).astype(np.int32)
    return Condition(vector, owner, _own(layout, batch, own) if own else None)


def _own(layout: Layout, batch: Batch, own: tuple[str, ...]) -> Array | np.ndarray:
    """Whether each token, or the lead in front of it, is of one of these fields."""
    is_own = lambda segment: row_of(segment.name) in own
    if not any(is_own(segment) for segment in layout.segments):
        return np.zeros(layout.length, bool)
    return layout.join(batch, _everywhere(layout, batch, is_own), fill=False)


def _everywhere(layout: Layout, batch: Batch, value: Callable[[Any], Any]) -> dict[tuple[str, str], np.ndarray]:
    """A value of each segment at its tokens and in front of them, [N], or [M, N] of the parts of packed rows."""
    found = {}
    for segment in layout.segments:
        packed = batch.packing is not None and segment.name in batch.packing.begins
        outer = (layout.parts_of(segment.name),) if packed else ()
        for copy, length in (("clean", segment.length), ("noisy", segment.length), ("lead", segment.lead)):
            if length:
                found[segment.name, copy] = np.full((*outer, length), value(segment))
    return found


def join_rows(parts: list[Embedded]) -> Embedded:
    """Stacks the rows of several tasks; a single task keeps its static arrays."""
    parts = [e._replace(vectors={}) for e in parts]
    if len(parts) == 1:
        return parts[0]
    contiguous = all(e.spec.contiguous for e in parts)

    def widen(e: Embedded) -> Embedded:
        shape = e.x.shape[:2]
        static = {k: jnp.broadcast_to(getattr(e.spec, k), shape) for k in ("read", "write", "group")}
        condition = e.condition._replace(owner=jnp.broadcast_to(e.condition.owner, shape))
        if condition.own is not None:
            module = np if isinstance(condition.own, np.ndarray) else jnp
            condition = condition._replace(own=module.broadcast_to(condition.own, shape))
        return e._replace(spec=e.spec.replace(**static, contiguous=contiguous), condition=condition)

    def stack(*leaves):  # what is known before any data stays so
        numpy = all(isinstance(leaf, np.ndarray) for leaf in leaves)
        return (np if numpy else jnp).concatenate(leaves)

    return jax.tree.map(stack, *(widen(e) for e in parts))


def pad_rows(e: Embedded, places: int) -> Embedded:
    """Rows with some places of padding behind them, so that the mesh axis `context` divides their length."""
    if not places:
        return e

    def widen(a, axis: int, value: int = 0):
        amount = [(0, places if i == axis else 0) for i in range(a.ndim)]
        return (np if isinstance(a, np.ndarray) else jnp).pad(a, amount, constant_values=value)

    spec = e.spec
    last = {k: widen(a, a.ndim - 1) for k in ("read", "write", "group", "segment") for a in [getattr(spec, k)]}
    relation = None if spec.relation is None else widen(widen(spec.relation, 1), 2)
    spec = spec.replace(**last, position=widen(spec.position, 1), relation=relation)
    owner, own = e.condition.owner, e.condition.own
    owner = widen(owner, owner.ndim - 1, -1)
    own = None if own is None else widen(own, own.ndim - 1)
    return Embedded(widen(e.x, 1), spec, e.condition._replace(owner=owner, own=own), e.vectors)
