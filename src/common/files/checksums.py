"""Checksums of arrays that do not depend on how the arrays lie on devices."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped, UInt32

PIECE = 2**16  # elements
SMALL = 2**26  # bytes
KINDS = ("float32", "bfloat16", "float16", "int32", "uint32", "int16", "uint16", "int8", "uint8")  # of `Running`


@jax.jit
def fingerprint(x: Shaped[Array, "*shape"]) -> UInt32[Array, ""]:
    """A checksum of an array's bits and their places, the same for every sharding, computed where the array lies.

    sum over elements i of mix(bits_i xor mix(i)) mod 2^32, where mix is the 32-bit finalizer of MurmurHash3 (Appleby
    2011), a bijection: every change of one element is seen, others are missed with a chance of about 2^-32.
    """
    return _share(x, np.uint32(0))


def fingerprint_in_parts(x: Shaped[Array, "*shape"], dtype: Any, axis: int, parts: int) -> UInt32[Array, ""]:
    """`fingerprint` of x in another dtype of at most 32 bits, some places of an axis after the other, in the memory of
    these: `parts` times as many as one. The axis should be one that no devices share."""
    strides = [math.prod(x.shape[i + 1 :]) for i in range(x.ndim)]
    size = x.shape[axis] // parts
    step = np.uint32(size * strides[axis] % 2**32)

    def add(k: Array, total: UInt32[Array, ""]) -> UInt32[Array, ""]:
        part = jax.lax.dynamic_slice_in_dim(x, k * size, size, axis)
        return total + _share(part.astype(dtype), k.astype(jnp.uint32) * step, strides)

    return jax.lax.fori_loop(0, parts, add, jnp.uint32(0))


def _share(
    x: Shaped[Array, "*shape"], start: UInt32[Array | np.generic, ""], strides: Sequence[int] | None = None
) -> UInt32[Array, ""]:
    """What an array adds whose elements are those from place `start` on of another one, whose strides (in elements) may
    be given where they are not its own."""
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_ or (jnp.issubdtype(x.dtype, jnp.integer) and jnp.iinfo(x.dtype).bits < 8):
        x = x.astype(jnp.int8)
    width = 8 * min(x.dtype.itemsize, 4)  # 64-bit elements become two of 32
    bits = jax.lax.bitcast_convert_type(x, f"uint{width}").astype(jnp.uint32)
    place = jnp.zeros(bits.shape, jnp.uint32) + start
    stride = 1
    for axis in reversed(range(bits.ndim)):
        each = strides[axis] if strides else stride
        place += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis) * np.uint32(each % 2**32)
        stride *= bits.shape[axis]
    return jnp.sum(_mix(bits ^ _mix(place)), dtype=jnp.uint32)


class Running:
    """`fingerprint` of an array of the host that is seen piece by piece, in C order; nothing is compiled for it."""

    def __init__(self) -> None:
        self._sum = self._place = 0

    def add(self, piece: np.ndarray) -> Running:
        """The next elements, of a type of 8, 16 or 32 bits."""
        flat = np.ascontiguousarray(piece).reshape(-1)
        bits = flat.view(f"uint{8 * flat.dtype.itemsize}")
        for part in np.split(bits, range(PIECE, bits.size, PIECE)):  # pieces that stay in the processor's cache
            place = np.arange(part.size, dtype=np.uint32) + np.uint32(self._place % 2**32)
            self._sum += int(_mix(part.astype(np.uint32) ^ _mix(place)).sum(dtype=np.uint64))
            self._place += part.size
        return self

    def value(self) -> int:
        """The fingerprint of all pieces as one array."""
        return self._sum % 2**32


def fingerprints(flat: Mapping[str, Array]) -> dict[str, int]:
    """`fingerprint` of every leaf, the same on every process."""
    if _is_small(flat):
        return {path: Running().add(np.asarray(x)).value() for path, x in flat.items()}
    # One program: several in flight at once may run in another order on another process and wait for ever.
    return {path: int(value) for path, value in jax.device_get(on_device(dict(flat))).items()}


def copies(flat: Mapping[str, Array]) -> dict[str, list[int]]:
    """Distinct fingerprints of the copies of every leaf on the devices of this process, sorted: one if they agree."""
    if _is_small(flat):
        shards = {path: [shard.data for shard in x.addressable_shards] for path, x in flat.items()}
        return {path: sorted({Running().add(np.asarray(x)).value() for x in each}) for path, each in shards.items()}
    prints = jax.block_until_ready(on_device(dict(flat)))
    shards = jax.device_get({path: [s.data for s in x.addressable_shards] for path, x in prints.items()})
    return {path: sorted({int(value) for value in values}) for path, values in shards.items()}


def _is_small(flat: Mapping[str, Array]) -> bool:
    """Whether numpy reads these leaves, whole arrays in the memory of this process, sooner than a program compiles."""
    if jax.default_backend() != "cpu" or sum(x.nbytes for x in flat.values()) > SMALL:
        return False
    return all(x.is_fully_addressable and x.is_fully_replicated and x.dtype in KINDS for x in flat.values())


@jax.jit
def on_device(flat: dict[str, Array]) -> dict[str, Array]:
    """`fingerprint` of every leaf, one program; where copies of a leaf differ, so do the copies of its fingerprint."""
    return {path: fingerprint(x) for path, x in flat.items()}


def _mix(x: UInt32[Array | np.ndarray, "*shape"]) -> UInt32[Array | np.ndarray, "*shape"]:
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
