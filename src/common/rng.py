"""Keys are derived from (seed, step, name), never carried along: a resumed run has the same draws."""

from __future__ import annotations

import zlib

import jax
from jaxtyping import Array, Int, UInt32


def step_key(seed: int | UInt32[Array, ""], step: int | Int[Array, ""]) -> Array:
    """The key of one step; both may be traced."""
    return jax.random.fold_in(jax.random.key(seed), step)


def stream(key: Array, name: str, *ints: int | Int[Array, ""]) -> Array:
    """The key of a named stream: crc32(name), then each integer in turn, folded into `key`.

    crc32 is the same in every process and version, unlike Python's `hash`. The integers (microbatch, device, row, …)
    are non-negative and may be traced. `key` itself is not consumed.
    """
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for value in ints:
        key = jax.random.fold_in(key, value)
    return key
