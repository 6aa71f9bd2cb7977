"""How kernels, which the compiler cannot partition, lie on the mesh in use."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.sharding import PartitionSpec

from src.common.mesh.sharding import BATCH_AXES
from src.models.attention import Sizes


class Axes(NamedTuple):
    """Axes of the mesh that rows, heads and queries are split over (None: not split); all of them in `names`."""

    rows: tuple[str, ...] | None = None
    heads: str | None = None
    context: str | None = None
    contexts: int = 1
    names: frozenset[str] = frozenset()

    def over(self, run: Callable, masks: Any) -> Callable:
        """`run(masks, q, k, v)` on every device for its rows `[B, …]`, heads and queries, `masks` split as given.

        q is `[B, Q, H, h]`, k and v are `[B, S, K, h]` and whole along the sequence.
        """
        if not self.names:
            return run
        queries, keys = PartitionSpec(self.rows, self.context, self.heads), PartitionSpec(self.rows, None, self.heads)
        specs = (masks, queries, keys, keys)
        return jax.shard_map(run, in_specs=specs, out_specs=queries, axis_names=self.names, check_vma=False)


def split(sizes: Sizes) -> Axes:
    """Rows over `data` and `fsdp`, heads over `tensor`, queries over `context`, each where it divides."""
    mesh = jax.sharding.get_abstract_mesh()
    free = {name: size for name, size in mesh.shape.items() if name not in mesh.manual_axes}
    if not free or mesh.size == 1:
        return Axes()  # on several devices a kernel needs every axis named, those of size 1 too
    rows = tuple(a for a in BATCH_AXES if free.get(a, 1) > 1)
    tensor, contexts = free.get("tensor", 1), free.get("context", 1)
    return Axes(
        rows=rows if rows and sizes.rows % math.prod(free[a] for a in rows) == 0 else None,
        heads="tensor" if tensor > 1 and sizes.heads % tensor == sizes.kv_heads % tensor == 0 else None,
        context="context" if contexts > 1 else None,
        contexts=contexts,
        names=frozenset(free),
    )
