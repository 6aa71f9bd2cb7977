"""Codes: vectors <-> the number of the nearest of some centroids, learned once from samples.

1. Nearest: argmin_k |x - c_k|² = argmin_k (|c_k|² - 2 x · c_k).
2. Start (k-means++, Arthur & Vassilvitskii 2007): each further centroid is a sample, drawn with a probability that is
   proportional to its squared distance from the centroids before it; of some draws the best is kept.
3. Iterations (Lloyd 1982): every sample goes to its nearest centroid, every centroid to the mean of its samples.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from src.codecs.learned_table import LearnedTable
from src.interfaces import FieldSpec

ROWS = 1 << 16  # samples whose distances are in memory at a time


class KMeans(LearnedTable):
    """Vectors as ids of `codes` centroids. Without a `path`, `fit` has to be called before the first use.

    before       the link in front, whose tokens are vectors
    seed         of the start
    iterations   at most so many
    path         a .npy file of centroids [codes, P] that were learned already: no training data are read
    folder       where centroids are kept that `fit` learns; "": the user's cache

    Raises ValueError for less than 2 codes, less than 1 iteration, tokens that are no vectors, and a file with others
    than `codes` centroids of their length; FileNotFoundError without the file.
    """

    kind: ClassVar[str] = "kmeans"
    what: ClassVar[str] = "the codes of kmeans, its centroids"

    def __init__(self, codes: int, before: Any, seed: int = 0, iterations: int = 100, path: str = "", folder: str = ""):
        if codes < 2 or iterations < 1:
            raise ValueError(f"codes={codes} must be at least 2, and iterations={iterations} at least 1")
        self.codes, self.seed, self.iterations = codes, seed, iterations
        self.open(before, (codes, getattr(before.spec, "features", None)), path, folder)
        self.spec: FieldSpec = dataclasses.replace(before.spec, vocab=codes, features=None)
        self.shape: tuple[int, ...] = before.shape[:1]

    @property
    def centroids(self) -> Float[np.ndarray, "codes P"]:
        """The vectors of the codes, f32. Raises ValueError before `fit`."""
        return self.table

    def options(self) -> str:
        """Codes, seed, iterations."""
        return f"{self.codes} {self.seed} {self.iterations}"

    def learn(self, samples: Float[np.ndarray, "n P"]) -> Float[np.ndarray, "codes P"]:
        """Centroids. Raises ValueError for less different samples than codes."""
        return _learn(samples.astype(np.float64), self.codes, self.seed, self.iterations)

    def encode(self, value: Float[Array, "*B N P"]) -> Int[Array, "*B N"]:
        """Ids of the nearest centroids; the first of equals."""
        centroids = jnp.asarray(self.centroids)
        products = jnp.einsum("...p,kp->...k", value, centroids, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin((centroids**2).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)

    def decode(self, tokens: Int[Array, "*B N"]) -> Float[Array, "*B N P"]:
        """The centroids of ids."""
        return jnp.asarray(self.centroids)[tokens]


def _learn(samples: Float[np.ndarray, "n P"], codes: int, seed: int, iterations: int) -> Float[np.ndarray, "codes P"]:
    """Centroids of samples (docstring of the module, 2 and 3), f32."""
    centroids = _start(samples, codes, np.random.RandomState(seed))  # whose stream is frozen in numpy
    labels = np.full(len(samples), -1)
    for _ in range(iterations):
        found, distance = _nearest(samples, centroids)
        if (found == labels).all():
            break
        labels = found
        count = np.bincount(labels, minlength=codes)
        sums = [np.bincount(labels, samples[:, p], codes) for p in range(samples.shape[1])]
        centroids = np.stack(sums, axis=-1) / np.maximum(count, 1)[:, None]
        empty = np.flatnonzero(count == 0)
        centroids[empty] = samples[np.argsort(-distance, kind="stable")[: len(empty)]]  # the worst represented
    return centroids.astype(np.float32)


def _start(samples: np.ndarray, codes: int, random: np.random.RandomState) -> np.ndarray:
    draws = 2 + int(math.log(codes))
    centroids = [samples[random.randint(len(samples))]]
    distance = ((samples - centroids[0]) ** 2).sum(-1)
    for index in range(1, codes):
        total = np.cumsum(distance)
        if total[-1] <= 0:
            raise ValueError(f"{codes} codes of kmeans cannot be learned from {index} different vectors: lower `codes`")
        chosen = np.searchsorted(total, random.random_sample(draws) * total[-1], side="right")
        chosen = np.minimum(chosen, len(samples) - 1)
        left = [np.minimum(distance, ((samples - samples[i]) ** 2).sum(-1)) for i in chosen]
        best = int(np.argmin([d.sum() for d in left]))
        centroids.append(samples[chosen[best]])
        distance = left[best]
    return np.stack(centroids)


def _nearest(samples: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Label of each sample, and its squared distance from that centroid."""
    labels, distances = [], []
    for first in range(0, len(samples), ROWS):
        part = samples[first : first + ROWS]
        relative = (centroids**2).sum(-1) - 2 * part @ centroids.T
        labels.append(relative.argmin(-1))
        distances.append(relative.min(-1) + (part**2).sum(-1))
    return np.concatenate(labels), np.concatenate(distances)
