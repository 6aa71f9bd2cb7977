"""Rotary positions (Su et al. 2021, arXiv 2104.09864), and their scaling for rows longer than in the pretraining."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

# Of each kind of scaling its numbers, in order; all are above 0.
SCALINGS: dict[str, tuple[str, ...]] = {
    "linear": ("factor",),
    "dynamic": ("factor", "length"),
    "llama3": ("factor", "low", "high", "length"),
    "yarn": ("factor", "fast", "slow", "length", "magnitude"),
}


def check_scaling(scaling: Sequence[Any]) -> tuple[Any, ...]:
    """The scaling as a tuple. Raises ValueError for an unknown kind, and for numbers that the kind does not have."""
    scaling = tuple(scaling)
    kind, numbers = (scaling[0], scaling[1:]) if scaling else ("", ())
    known = len(numbers) == len(SCALINGS.get(kind, ())) if kind in SCALINGS else not scaling
    if not known or not all(isinstance(n, int | float) and not isinstance(n, bool) and n > 0 for n in numbers):
        forms = ", ".join(f"({name!r}, {', '.join(names)})" for name, names in SCALINGS.items())
        raise ValueError(f"model.trunk.rope_scaling={scaling!r} is unknown; use () or {forms}, with numbers above 0")
    if kind == "llama3" and numbers[2] <= numbers[1]:
        raise ValueError(f"model.trunk.rope_scaling={scaling!r}: low must be below high")
    if kind == "yarn" and numbers[1] <= numbers[2]:
        raise ValueError(f"model.trunk.rope_scaling={scaling!r}: slow must be below fast")
    return scaling


def rotary_frequencies(count: int, theta: float, scaling: Sequence[Any] = (), slots: int = 0) -> np.ndarray:
    """theta^(-k / count) for k = 0, …, count - 1, in f64, then scaled for rows longer than those of the pretraining.

    scaling  (): as they are
             ("linear", factor): divided by the factor (Chen et al. 2023, arXiv 2306.15595)
             ("dynamic", factor, length): theta grows with the row, so that the lowest frequency of a row of
             `slots > length` is divided by factor · slots / length - factor + 1 (NTK scaling, as in transformers)
             ("llama3", factor, low, high, length): wavelengths above length / low are divided by the factor, those
             below length / high stay, those between are interpolated (Llama 3.1, arXiv 2407.21783)
             ("yarn", factor, fast, slow, length, magnitude): frequencies that turn more than `fast` times in `length`
             stay, those that turn less than `slow` times are divided by the factor, those between are interpolated by
             their number k; see `rotary_magnitude` (Peng et al. 2023, arXiv 2309.00071)
    slots    of the whole row; only `dynamic` reads it

    Raises ValueError for another scaling.
    """
    kind, *numbers = check_scaling(scaling) or ("",)
    if kind == "dynamic" and count > 1:
        factor, length = numbers
        theta = theta * (factor * max(slots, length) / length - factor + 1) ** (count / (count - 1))
    frequency = theta ** (-np.arange(count, dtype=np.float64) / count)
    if kind == "linear":
        return frequency / numbers[0]
    if kind == "llama3":
        factor, low, high, length = numbers
        kept = np.clip((length * frequency / (2 * np.pi) - low) / (high - low), 0, 1)
        return frequency * (kept + (1 - kept) / factor)
    if kind == "yarn":
        factor, *bounds, length, _ = numbers
        kept = 1 - _yarn_ramp(count, theta, bounds, length)
        return frequency * (kept + (1 - kept) / factor)
    return frequency


def _yarn_ramp(count: int, theta: float, bounds: Sequence[Any], length: int | float) -> np.ndarray:
    """0 where a frequency stays, 1 where it is divided, `[count]`."""
    if theta <= 1:
        raise ValueError(f"model.trunk.rope_theta={theta!r} must be above 1 where rope_scaling is 'yarn'")
    # The number k of the frequency that turns so many times in `length`, by theta^(-k / count) · length = 2π · turns.
    first, last = (count * math.log(length / (2 * math.pi * turns)) / math.log(theta) for turns in bounds)
    first, last = max(math.floor(first), 0), min(math.ceil(last), 2 * count - 1)
    return np.clip((np.arange(count) - first) / (last - first or 1e-3), 0, 1)


def rotary_magnitude(scaling: Sequence[Any]) -> float:
    """What rotated queries and keys are multiplied by: 1, or the last number of `yarn` (its 0.1 ln factor + 1)."""
    return float(scaling[-1]) if scaling and scaling[0] == "yarn" else 1.0


def rotary_angles(
    position: Int[Array, "*B S A"], head_dim: int, theta: float, scaling: Sequence[Any] = (), slots: int = 0
) -> Float[Array, "*B S half"]:
    """Rotary angles; the `head_dim / 2` frequencies are shared out evenly among the A axes (A = 1: Llama)."""
    axes = position.shape[-1]
    per_axis = head_dim // 2 // axes
    frequency = rotary_frequencies(per_axis, theta, scaling, slots)
    angles = position[..., None].astype(jnp.float32) * jnp.asarray(frequency, jnp.float32)
    return angles.reshape(*position.shape[:-1], axes * per_axis)


def rotate(
    x: Float[Array, "B S H h"], angles: Float[Array, "*B S half"], magnitude: float = 1.0
) -> Float[Array, "B S H h"]:
    """Applies RoPE in the half-split convention of Llama: pairs are (i, i + h/2), not neighbours."""
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]
    if magnitude != 1:
        cos, sin = magnitude * cos, magnitude * sin
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
