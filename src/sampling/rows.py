"""Rows on the devices: which mesh parameters lie on, and arrays of the host split over it."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from src.common.mesh.sharding import BATCH_AXES, batch_sharding
from src.common.tree import flatten
from src.interfaces import PyTree


def mesh_of(params: PyTree) -> Mesh | None:
    """The mesh that parameters, arrays or abstract arrays, lie on; None for arrays of one device or of the host."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def specs_of(params: PyTree) -> dict[str, PartitionSpec]:
    """Where each parameter lies, by path; nothing where none of them is split."""
    shardings = {path: getattr(leaf, "sharding", None) for path, leaf in flatten(params).items()}
    specs = {path: s.spec if isinstance(s, NamedSharding) else PartitionSpec() for path, s in shardings.items()}
    return specs if any(any(spec) for spec in specs.values()) else {}


def ways(mesh: Mesh | None) -> int:
    """How many devices have rows of their own."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def chunk(arrays: PyTree, start: int, size: int, mesh: Mesh | None) -> PyTree:
    """`size` rows of arrays [B, …] from `start` on, and some more so that the devices have as many each; behind the
    last row it comes again."""
    whole = -(-size // ways(mesh)) * ways(mesh)

    def pick(array: np.ndarray) -> np.ndarray:
        return array[np.minimum(np.arange(start, start + whole), len(array) - 1)]

    return jax.tree.map(pick, arrays)


def put(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """Arrays of the host, the same on every process, with their rows split over the mesh."""
    if mesh is None:
        return arrays
    split = batch_sharding(mesh)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, split, lambda index: array[index])

    return jax.tree.map(place, arrays)


def abstract(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """The shapes of what `put` gives."""
    split = None if mesh is None else batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split), arrays)
