"""The named points at which the sharding of activations is pinned."""

from __future__ import annotations

import math

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

BATCH_AXES = ("data", "fsdp")


def constrain_batch(x: Array) -> Array:
    """Shards axis 0 over the batch axes of the mesh in use (`jax.set_mesh`); without a mesh it does nothing."""
    mesh = jax.sharding.get_abstract_mesh()
    axes = tuple(a for a in BATCH_AXES if a in mesh.axis_names)
    if not axes or x.shape[0] % math.prod(mesh.shape[a] for a in axes):
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(axes))
