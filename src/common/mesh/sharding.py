"""Meshes, and the sharding of each array.

Mesh axes, in this order: `data` (rows; also across slices), `fsdp` (rows, and parameters cut by size), `tensor` (heads,
feed-forward features and vocabulary), `context` (places of the sequence).
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from src.common import tree

AXES = ("data", "fsdp", "tensor", "context")
BATCH_AXES = ("data", "fsdp")
MIN_SIZE = 2**16
WHOLE = "extra/states/"  # paths in a train state
Rules = Sequence[tuple[str, int]]


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A device mesh with the named axis sizes, e.g. `{"data": -1, "fsdp": 4}`; one size may be -1 (what is left over).

    `devices` defaults to all of them. Where they belong to several slices, `data` runs across the slices, so that only
    gradients cross the slow network. Raises ValueError when an axis is unknown, the sizes do not use exactly those
    devices, or `data` is no multiple of the slices.
    """
    devices = jax.devices() if devices is None else list(devices)
    order = [name for name in AXES if name in axes] + [name for name in axes if name not in AXES]
    asked = ", ".join(f"{name}={axes[name]}" for name in order if name in BATCH_AXES or axes[name] != 1)
    have = f"{len(devices)} {devices[0].platform} device{'s' * (len(devices) > 1)} of {jax.process_count()} process(es)"
    unknown = [name for name in axes if name not in AXES]
    if unknown:
        raise ValueError(f"mesh ({asked}) has an axis {unknown[0]!r}; the axes are {', '.join(AXES)}")
    sizes = {name: axes[name] for name in AXES if name in axes}
    open_axes = [name for name, size in sizes.items() if size == -1]
    if not sizes or len(open_axes) > 1 or any(size < 1 for size in sizes.values() if size != -1):
        raise ValueError(f"mesh ({asked}) needs positive axis sizes, at most one of them -1; change the mesh config")
    rest = math.prod(size for size in sizes.values() if size != -1)
    if open_axes and len(devices) % rest == 0:
        sizes[open_axes[0]] = len(devices) // rest
    if math.prod(sizes.values()) != len(devices):
        free = open_axes[0] if open_axes else next(iter(sizes))
        others = [name for name, size in sizes.items() if name != free and (size > 1 or name in BATCH_AXES)]
        raise ValueError(
            f"mesh ({asked}) does not fit {have}: set mesh.{free} to -1"
            f"{''.join(f', and mesh.{name} to a size that divides {len(devices)}' for name in others)}"
        )
    # Sharding constraints need Auto axes.
    return Mesh(_arrange(sizes, devices), tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))


def _arrange(sizes: Mapping[str, int], devices: Sequence[Any]) -> np.ndarray:
    """Devices in the mesh's shape, neighbours in the network next to each other along the last axes."""
    shape = tuple(sizes.values())
    slices = 1 if devices[0].platform == "cpu" else len({getattr(d, "slice_index", 0) for d in devices})
    if slices == 1:
        split = devices[0].platform == "tpu"  # some shapes on three-dimensional tori need a physical axis cut in two
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=split)
    if sizes.get("data", 1) % slices:
        raise ValueError(
            f"the devices are {slices} slices, and mesh.data={sizes.get('data', 1)} does not divide over them: set"
            f" mesh.data to a multiple of {slices}"
        )
    inner = (shape[0] // slices, *shape[1:])  # `data` comes first
    outer = (slices, *[1] * (len(shape) - 1))
    return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def batch_spec(mesh: Any) -> PartitionSpec:
    """Rows over the axes `data` and `fsdp`, those that the mesh has."""
    axes = tuple(name for name in BATCH_AXES if name in mesh.axis_names)
    return PartitionSpec(axes) if axes else PartitionSpec()


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a batch `[B, …]`: rows over the axes `data` and `fsdp`; `tensor` and `context` share them."""
    return NamedSharding(mesh, batch_spec(mesh))


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which axis of a parameter is split over what.

    tensor     (regex on the path, axis) pairs; the first match has the axis that `mesh.tensor` splits, if it divides
    min_size   parameters of fewer elements are never split over `fsdp`
    """

    tensor: Rules = ()
    min_size: int = MIN_SIZE

    def spec(self, path: str, shape: Sequence[int], mesh: Any) -> PartitionSpec:
        """Where one array lies: `tensor` by rule, then `fsdp` by size.

        `fsdp` takes the largest axis left that it divides (the first of equals). Leaves whose path contains "layers"
        are stacked, `[L, …]`, and never split along L, which the scan over layers walks. The states of processes
        (`extra/states/…`) are whole on every device, because all of them are read at once, and not as parameters are.
        """
        if path.startswith(WHOLE):
            return PartitionSpec()
        entries: list[Any] = [None] * len(shape)
        first = 1 if "layers" in path else 0
        tensor, fsdp = mesh.shape.get("tensor", 1), mesh.shape.get("fsdp", 1)
        if tensor > 1:
            axis = next((axis for pattern, axis in self.tensor if re.search(pattern, path)), None)
            # Factored optimizer states lack some axes of their parameter.
            place = None if axis is None or not -len(shape) <= axis < len(shape) else axis % len(shape)
            if place is not None and place >= first and shape[place] % tensor == 0:
                entries[place] = "tensor"
        free = [a for a in range(first, len(shape)) if entries[a] is None and shape[a] % fsdp == 0]
        if fsdp > 1 and math.prod(shape) >= self.min_size and free:
            entries[max(free, key=lambda a: shape[a])] = "fsdp"
        while entries and entries[-1] is None:
            entries.pop()
        return PartitionSpec(*entries)

    def check(self, shapes: Any, mesh: Mesh) -> None:
        """Raises ValueError when a rule cannot be read or names an axis that its parameters lack, or when
        `mesh.tensor` splits nothing; `shapes` are the parameters."""
        leaves = tree.flatten(shapes)
        tree.check_rules(self.tensor, "sharding.tensor's rules")
        for pattern, axis in self.tensor:
            try:
                found = [path for path in leaves if re.search(pattern, path)]
            except re.error as error:
                raise ValueError(f"sharding.tensor has the rule {pattern!r}, which is no regex ({error})") from error
            short = next((p for p in found if not -leaves[p].ndim <= axis < leaves[p].ndim), None)
            if short:
                raise ValueError(
                    f"sharding.tensor splits axis {axis} by {pattern!r}, but {short} is {leaves[short].shape}"
                )
        ways = mesh.shape.get("tensor", 1)
        if ways > 1 and not any("tensor" in self.spec(path, leaf.shape, mesh) for path, leaf in leaves.items()):
            raise ValueError(f"mesh.tensor={ways} splits no parameter: set it to 1, or see sharding.tensor")

    def shardings(self, shapes: Any, mesh: Mesh) -> Any:
        """A tree of shardings for a tree of arrays or abstract arrays (parameters, or a state that holds them)."""
        return jax.tree_util.tree_map_with_path(
            lambda path, leaf: NamedSharding(mesh, self.spec(tree.path_string(path), leaf.shape, mesh)), shapes
        )
