"""Host arrays as rows of one size, sharded over the mesh of the parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from src.common.mesh.sharding import BATCH_AXES, batch_sharding
from src.common.tree import flatten
from src.interfaces import PyTree, Tokens


def mesh_of(params: PyTree) -> Mesh | None:
    """The mesh of parameters (arrays or abstract arrays); None on one device or on the host."""
    shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(params))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)


def specs_of(params: PyTree) -> dict[str, PartitionSpec]:
    """The PartitionSpec of each parameter, by path; empty if none is sharded."""
    shardings = {path: getattr(leaf, "sharding", None) for path, leaf in flatten(params).items()}
    specs = {path: s.spec if isinstance(s, NamedSharding) else PartitionSpec() for path, s in shardings.items()}
    return specs if any(any(spec) for spec in specs.values()) else {}


def row_shards(mesh: Mesh | None) -> int:
    """Number of shards of the batch axis."""
    return 1 if mesh is None else math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def chunk(arrays: PyTree, start: int, size: int, mesh: Mesh | None) -> PyTree:
    """`size` rows of arrays [B, …] from `start` on, rounded up to a multiple of the shards; repeats the last row."""
    whole = -(-size // row_shards(mesh)) * row_shards(mesh)

    def pick(array: np.ndarray) -> np.ndarray:
        return array[np.minimum(np.arange(start, start + whole), len(array) - 1)]

    return jax.tree.map(pick, arrays)


def put(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """Host arrays, equal on all processes, with rows sharded over the mesh."""
    if mesh is None:
        return arrays
    split = batch_sharding(mesh)

    def place(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, split, lambda index: array[index])

    return jax.tree.map(place, arrays)


def abstract(arrays: PyTree, mesh: Mesh | None) -> PyTree:
    """The result of `put` as abstract arrays."""
    split = None if mesh is None else batch_sharding(mesh)
    return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=split), arrays)


def resized(tokens: Tokens, length: int, most: int) -> Tokens:
    """Texts in a segment of another length, with up to `most` new tokens after the given ones."""
    rows, given = len(tokens.valid), (tokens.valid & ~tokens.target).sum(axis=1)[:, None]
    number = np.arange(length)
    value = np.zeros((rows, length, *tokens.value.shape[2:]), tokens.value.dtype)
    shared = min(length, tokens.valid.shape[1])
    value[:, :shared] = tokens.value[:, :shared]
    target = (number >= given) & (number < given + most)
    return tokens.replace(value=value, valid=number < given + most, target=target)
