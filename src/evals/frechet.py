"""Fréchet distance between two sets of features (Heusel et al. 2017, eq. 6; Dowson & Landau 1982)."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float


def frechet_distance(x: Float[np.ndarray, "n d"], y: Float[np.ndarray, "m d"]) -> float:
    """Squared Fréchet distance of the Gaussians with the means and (unbiased) covariances of `x` and `y`.

    It shrinks with the sample size: compare only numbers from equal n and m. NaN if a value is not finite.
    Raises ValueError for less than two rows or different d.
    """
    if x.ndim != 2 or y.ndim != 2 or min(len(x), len(y)) < 2 or x.shape[1] != y.shape[1]:
        raise ValueError(f"a Fréchet distance needs features [n >= 2, d] and [m >= 2, d], not {x.shape} and {y.shape}")
    if not (np.isfinite(x).all() and np.isfinite(y).all()):
        return float("nan")
    x, y = x.astype(np.float64), y.astype(np.float64)
    covariances = (np.atleast_2d(np.cov(values, rowvar=False)) for values in (x, y))
    return frechet_of_moments(x.mean(0), y.mean(0), *covariances)


def frechet_of_moments(
    mean_x: Float[np.ndarray, " d"],
    mean_y: Float[np.ndarray, " d"],
    covariance_x: Float[np.ndarray, "d d"],
    covariance_y: Float[np.ndarray, "d d"],
) -> float:
    """|μx - μy|² + tr Σx + tr Σy - 2 tr (Σx^½ Σy Σx^½)^½, never below 0."""
    # The last trace is the sum of the singular values of Σx^½ Σy^½: no root of a product, so no complex rounding.
    roots = _root(covariance_x) @ _root(covariance_y)
    overlap = np.linalg.svd(roots, compute_uv=False).sum()
    apart = np.sum((mean_x - mean_y) ** 2)
    return max(0.0, float(apart + np.trace(covariance_x) + np.trace(covariance_y) - 2 * overlap))


def _root(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
