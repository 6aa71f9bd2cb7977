"""Arrays by path that are somewhere else: looked at without being read, and read block by block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Sharding

STACK = "trunk/layers/"  # below it, the first axis of a leaf is that of the blocks


@runtime_checkable
class Leaves(Protocol):
    """`shapes` has the dtype and shape of each leaf by its path; `blocks` reads one.

    Of a leaf below `STACK` it gives what lies along the first axis one after the other, of others the whole. What it
    gives may be a view of a file, is read-only and is used up before the next is asked for.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]

    def blocks(self, path: str) -> Iterator[np.ndarray]: ...


class Arrays:
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
    """A leaf in another dtype, on the devices of this process that `sharding` names (None: the first one).

    One piece of the leaf at a time is in the memory of the host, and every process reads only its own pieces.
    """
    shape = tuple(leaves.shapes[path].shape)
    sharding = sharding or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    holders: dict[tuple[tuple[int, int], ...], list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
        holders.setdefault(bounds, []).append(device)
    pieces = []
    for bounds, devices in holders.items():
        piece = _piece(leaves, path, bounds, dtype)
        copies = [jax.device_put(piece, device) for device in devices]
        jax.block_until_ready(copies)
        pieces += copies
        del piece, copies
    return jax.make_array_from_single_device_arrays(shape, sharding, pieces)


def _piece(leaves: Leaves, path: str, bounds: tuple[tuple[int, int], ...], dtype: Any) -> np.ndarray:
    index = tuple(slice(*pair) for pair in bounds)
    piece = np.empty([end - begin for begin, end in bounds], dtype)
    if not is_stacked(path):
        (whole,) = leaves.blocks(path)
        piece[...] = whole[index]
        return piece
    (first, last), rest = bounds[0], index[1:]
    for number, block in enumerate(leaves.blocks(path)):
        if first <= number < last:
            piece[number - first] = block[rest]
    return piece
