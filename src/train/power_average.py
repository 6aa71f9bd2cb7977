"""Averages of parameters whose weights are a power of time, and how others are made of them afterwards.

Karras et al. 2024 (arXiv 2312.02696, section 3 and appendix C). The average of exponent γ after t steps weighs the
parameters of step τ by p(τ) = (γ + 1) τ^γ / t^(γ + 1) on 0 … t. Its `width` is the standard deviation of that profile
over t. A run keeps two averages of different widths; their values at several steps give, by least squares of the
profiles, the average of any other width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

WIDEST = 0.28  # below 1 / sqrt(12), the width of the mean of all steps (γ = 0)


def exponent_of(width: float) -> float:
    """γ of a width: the root of (γ + 2)² (γ + 3) width² = γ + 1. Raises ValueError for a width outside of 0 … 0.28."""
    if not 0 < width <= WIDEST:
        raise ValueError(f"an average has a width above 0 and up to {WIDEST}, not {width}")
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(roots.real.max())


def power_weight(exponent: float, step: Int[Array, ""] | int) -> Float[Array, ""]:
    """The weight of the new parameters in the average, 1 - (1 - 1/t)^(γ + 1) for the step t = `step` + 1."""
    passed = 1.0 / (jnp.asarray(step, jnp.float32) + 1.0)
    return -jnp.expm1((exponent + 1.0) * jnp.log1p(-passed))


def overlap(first: tuple[Any, Any], second: tuple[Any, Any]) -> Any:
    """The integral of the product of two profiles, each (γ, t), float64, by broadcasting."""
    (a, s), (b, t) = first, second
    power = np.where(s < t, b, -a)
    return (a + 1) * (b + 1) * (s / t) ** power / ((a + b + 1) * np.maximum(s, t))


def combination(
    exponents: Sequence[float], steps: Sequence[int], exponent: float, step: int
) -> Float[np.ndarray, " n"]:
    """The weights of averages (`exponents`, after `steps` steps) whose sum is nearest to another average's profile.

    Least squares of the profiles over time, as in the paper, and with a sum of weights of 1 beyond it, so that
    parameters that stand still come out as they are; float64.
    """
    kept = np.asarray(exponents, np.float64), np.asarray(steps, np.float64)
    rows = tuple(part[:, None] for part in kept)
    count, scale = len(exponents), 1.0 / step  # of the size of the overlaps
    matrix = np.full((count + 1, count + 1), scale)
    matrix[:count, :count], matrix[count, count] = overlap(rows, kept), 0.0
    wanted = np.append(overlap(kept, (np.float64(exponent), np.float64(step))), scale)
    return np.linalg.lstsq(matrix, wanted, rcond=1e-12)[0][:count]


def distance(exponents: Sequence[float], steps: Sequence[int], exponent: float, step: int) -> float:
    """How far the combination's profile is from the wanted one, as a share of the wanted one's norm; 0 is exact."""
    weights = combination(exponents, steps, exponent, step)
    kept = np.asarray(exponents, np.float64), np.asarray(steps, np.float64)
    wanted = np.float64(exponent), np.float64(step)
    whole = overlap(wanted, wanted)
    inner = weights @ overlap(tuple(part[:, None] for part in kept), kept) @ weights
    square = inner - 2 * weights @ overlap(kept, wanted) + whole
    return float(np.sqrt(max(square, 0.0) / whole))
