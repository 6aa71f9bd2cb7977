"""Meshes, and which axis of which array lies where."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from src.common import tree

BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A device mesh with the named axis sizes, e.g. `{"data": -1, "fsdp": 4}`; one size may be -1 (what is left over).

    `devices` defaults to all of them. Raises ValueError when the sizes do not use exactly those devices.
    """
    devices = jax.devices() if devices is None else list(devices)
    asked = ", ".join(f"{name}={size}" for name, size in axes.items())
    have = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)} of {jax.process_count()} process(es)"
    sizes = dict(axes)
    open_axes = [name for name, size in sizes.items() if size == -1]
    if not sizes or len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"mesh ({asked}) needs positive axis sizes, at most one of them -1; change the mesh config")
    rest = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % rest == 0:
        sizes[open_axes[0]] = len(devices) // rest
    if math.prod(sizes.values()) != len(devices):
        free = open_axes[0] if open_axes else next(iter(sizes))
        others = {name: size for name, size in axes.items() if name != free}
        raise ValueError(
            f"mesh ({asked}) does not fit {have}: set mesh.{free} to -1"
            f"{''.join(f', and mesh.{name} to a size that divides {len(devices)}' for name in others)}"
        )
    shape, names = tuple(sizes.values()), tuple(sizes)
    # Sharding constraints need Auto axes, and make_mesh would choose Explicit ones.
    return jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names), devices=devices)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch `[B, …]`: rows over the axes `data` and `fsdp` (those that the mesh has)."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    return NamedSharding(mesh, PartitionSpec(axes) if axes else PartitionSpec())


def infer_param_sharding(shapes: Any, mesh: Mesh, min_size: int = 2**16) -> Any:
    """A tree of shardings for a tree of arrays or abstract arrays: fully sharded data parallelism by size.

    Each leaf of at least `min_size` elements is split over `fsdp` along its largest axis that the number of fsdp
    devices divides (the first of equals); the others are replicated. Leaves whose path contains "layers" are stacked,
    `[L, …]`, and never split along L, which the scan over layers walks.
    """
    ways = mesh.shape.get("fsdp", 1)

    def choose(path: Sequence[Any], leaf: Any) -> NamedSharding:
        first = 1 if "layers" in tree.path_string(path) else 0
        axes = [axis for axis in range(first, len(leaf.shape)) if leaf.shape[axis] % ways == 0]
        if ways == 1 or math.prod(leaf.shape) < min_size or not axes:
            return replicated(mesh)
        axis = max(axes, key=lambda a: leaf.shape[a])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree_util.tree_map_with_path(choose, shapes)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """A host batch as device arrays, rows split over `data` and `fsdp`.

    Leaves are numpy arrays `[B_process, …]`, this process's rows (all rows when there is one process); the result has
    `[B, …]` with B = B_process · processes. Raises ValueError when B does not divide over the devices.
    """
    sharding = batch_sharding(mesh)
    ways = math.prod(mesh.shape.get(name, 1) for name in BATCH_AXES)
    processes = jax.process_count()

    def put(path: Sequence[Any], leaf: Any) -> jax.Array:
        leaf = np.asarray(leaf)
        rows = leaf.shape[0] * processes if leaf.ndim else 0
        if not rows or rows % ways:
            raise ValueError(
                f"the batch's {tree.path_string(path)!r} of shape {leaf.shape} has {rows} rows in all, which do not"
                f" divide over {ways} devices (data x fsdp): set the batch size to a multiple of {ways}"
            )
        if processes == 1:
            return jax.device_put(leaf, sharding)
        return jax.make_array_from_process_local_data(sharding, leaf)

    return jax.tree_util.tree_map_with_path(put, batch)
