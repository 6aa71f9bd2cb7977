"""Lazy arrays keyed by path: shapes and dtypes without reading, values block by block."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding

STACK = "trunk/layers/"  # below it, the first axis of a leaf is that of the blocks


@runtime_checkable
class Leaves(Protocol):
    """`shapes` has the dtype and shape of each leaf by its path; `blocks` reads one.

    A leaf below `STACK` is yielded in pieces along its first axis, any other leaf as a whole. A piece may be a view of
    a file, is read-only, and is valid until the next one is read.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]

    def blocks(self, path: str) -> Iterator[np.ndarray]: ...


class LazyArrays:
    """`Leaves` that are in memory."""

    def __init__(self, leaves: Mapping[str, Any]):
        self._leaves = leaves
        self.shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in leaves.items()}

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        leaf = np.asarray(jax.device_get(self._leaves[path]))
        return iter(leaf) if is_stacked(path) else iter([leaf])


def is_stacked(path: str) -> bool:
    """Whether the first axis of a leaf is that of the blocks."""
    return path.startswith(STACK)


def place(leaves: Leaves, path: str, dtype: Any, sharding: Sharding | None = None) -> jax.Array:
    """A leaf in another dtype, on the devices that `sharding` names (None: the first of this process).

    It is read once, a block at a time, and a device's share of one block is in the memory of the host in `dtype`; every
    process copies only its own. Raises ValueError for a sharding that splits the first axis of a stack.
    """
    shape, dtype = tuple(leaves.shapes[path].shape), jnp.dtype(dtype)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    if not is_stacked(path):
        (placed,) = (_placed(block, dtype, sharding) for block in leaves.blocks(path))
        return placed
    empty, write, inner = _stack(shape, dtype, sharding)
    stack = empty()
    for number, block in enumerate(leaves.blocks(path)):
        stack = write(stack, _placed(block, dtype, inner), np.int32(number))
        jax.block_until_ready(stack)  # so that the next block does not come before this one is gone
    return stack


@functools.cache
def _stack(
    shape: tuple[int, ...], dtype: np.dtype, sharding: Sharding
) -> tuple[Callable[[], jax.Array], Callable[..., jax.Array], Sharding]:
    """Functions that make a stack and put a block into it in place, and the sharding of the block."""
    inner = sharding
    if isinstance(sharding, NamedSharding):
        if sharding.spec and sharding.spec[0] is not None:
            raise ValueError(f"the sharding {sharding.spec} splits blocks from each other: split another axis")
        inner = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))
    put = lambda stack, block, at: jax.lax.dynamic_update_index_in_dim(stack, block, at, 0)
    empty = jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=sharding)
    return empty, jax.jit(put, donate_argnums=0, out_shardings=sharding), inner


def _placed(block: np.ndarray, dtype: np.dtype, sharding: Sharding) -> jax.Array:
    """An array of the host on devices, this process's share of it."""
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(block.shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, block.shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        piece = np.array(block[tuple(slice(*pair) for pair in bounds)], dtype, order="C")  # a copy: no view of a file
        copies = [jax.device_put(piece, device) for device in devices]
        jax.block_until_ready(copies)
        pieces += copies
        del piece, copies
    return jax.make_array_from_single_device_arrays(block.shape, sharding, pieces)
