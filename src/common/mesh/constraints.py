"""Sharding constraints on activations at named points, and the axes of the mesh in use."""

from __future__ import annotations

import math

import jax
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array

# What the axes of an activation are split over.
AXES = {"rows": ("data", "fsdp"), "places": ("context",), "features": ("tensor",)}


def automatic_axes() -> dict[str, int]:
    """Sizes of the axes of the mesh in use (`jax.set_mesh`) that the compiler partitions and that are larger than 1."""
    mesh = jax.sharding.get_abstract_mesh()
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name: mesh.shape[name] for name, kind in kinds if kind == AxisType.Auto and mesh.shape[name] > 1}


def constrain(x: Array, *names: str | None) -> Array:
    """Pins the axes of x: `rows`, `places` (of the sequence), `features` (or heads); None is held whole.

    Without a mesh, or where the axis of the mesh has one device or does not divide, it leaves that axis alone.
    """
    sizes = automatic_axes()
    if not sizes:
        return x

    def entry(length: int, name: str | None):
        if name is None:
            return None
        axes = tuple(axis for axis in AXES[name] if axis in sizes)
        fits = axes and length % math.prod(sizes[axis] for axis in axes) == 0
        return axes if fits else PartitionSpec.UNCONSTRAINED

    entries = [entry(length, name) for length, name in zip(x.shape, names, strict=True)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*entries))


def platform() -> str:
    """Of the mesh in use, which may be of devices that are not here, or else of the default device: cpu, tpu, gpu."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device and device.platform) or jax.default_backend()
