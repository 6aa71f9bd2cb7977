"""Codes: vectors <-> the number of the nearest of some centroids, learned once from samples.

1. Nearest: argmin_k |x - c_k|² = argmin_k (|c_k|² - 2 x · c_k).
2. Start (k-means++, Arthur & Vassilvitskii 2007): each further centroid is a sample, drawn with a probability that is
   proportional to its squared distance from the centroids before it; of some draws the best is kept.
3. Iterations (Lloyd 1982): every sample goes to its nearest centroid, every centroid to the mean of its samples.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import os
import re
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float, Int

from src.common.files.npy import read_npy
from src.common.files.store import cache_folder, local_copy, write_whole
from src.interfaces import FieldSpec

NAME = re.compile(r"kmeans-[0-9a-f]{16}\.npy")
ROWS = 1 << 16  # samples whose distances are in memory at a time


class KMeans:
    """Vectors as ids of `codes` centroids. Without a `path`, `fit` has to be called before the first use.

    before       the link in front, whose tokens are vectors
    seed         of the start
    iterations   at most so many
    path         a .npy file of centroids [codes, P] that were learned already: no training data are read
    folder       where centroids are kept that `fit` learns; "": the user's cache

    Raises ValueError for less than 2 codes, less than 1 iteration, tokens that are no vectors, and a file with others
    than `codes` centroids of their length; FileNotFoundError without the file.
    """

    where: ClassVar[str] = "device"
    learns: ClassVar[str] = "values"

    def __init__(self, codes: int, before: Any, seed: int = 0, iterations: int = 100, path: str = "", folder: str = ""):
        if codes < 2 or iterations < 1:
            raise ValueError(f"codes={codes} must be at least 2, and iterations={iterations} at least 1")
        if before.spec is None or before.spec.features is None or before.spec.vocab is not None:
            raise ValueError("kmeans needs a link in front whose tokens are vectors, as {'name': 'patch', 'size': 2}")
        self.codes, self.before, self.seed, self.iterations = codes, before, seed, iterations
        self.folder = folder or os.path.join(cache_folder(), "kmeans")
        self.spec: FieldSpec = dataclasses.replace(before.spec, vocab=codes, features=None)
        self.shape: tuple[int, ...] = before.shape[:1]
        self._centroids = self._read(path) if path else None

    @property
    def unfitted(self) -> bool:
        """Whether the codes have to be learned before the first use."""
        return self._centroids is None

    @property
    def centroids(self) -> Float[np.ndarray, "codes P"]:
        """The vectors of the codes, f32. Raises ValueError before `fit`."""
        if self._centroids is None:
            raise ValueError(
                f"the {self.codes} codes of kmeans are not learned yet: call `fit` with vectors of the training data"
            )
        return self._centroids

    def fit(self, samples: Float[np.ndarray, "n P"], about: str = "") -> KMeans:
        """Learns the centroids, at the first time, and else reads them from `folder`; gives the link itself.

        The file's name contains a hash of the samples and options, so that other samples never find old centroids.
        `about` is what `recall` may find them by.
        Raises ValueError for samples of another length than the tokens, for some that are not finite, and for less
        different ones than codes; OSError where the folder cannot be written.
        """
        samples = np.ascontiguousarray(samples, np.float32)
        if samples.shape[1] != self.before.spec.features or not np.isfinite(samples).all():
            raise ValueError(
                f"kmeans learns from finite vectors of {self.before.spec.features} numbers, not from samples of "
                f"{samples.shape[1]}, or from some that are not finite"
            )
        options = f"{self.codes} {self.seed} {self.iterations} {samples.shape}"
        name = f"kmeans-{hashlib.sha256(options.encode() + samples.tobytes()).hexdigest()[:16]}.npy"
        path = epath.Path(self.folder) / name
        try:
            if not path.exists():
                file = io.BytesIO()
                np.save(file, _learn(samples.astype(np.float64), self.codes, self.seed, self.iterations))
                write_whole(path, file.getvalue())
            if about and _text(self._note(about)) != name:
                write_whole(self._note(about), name.encode())
        except OSError as error:
            raise OSError(
                f"the centroids cannot be kept in {self.folder} ({error}); set XDG_CACHE_HOME to a writable folder"
            ) from error
        self._centroids = self._read(path)
        return self

    def recall(self, about: str) -> bool:
        """Takes the centroids that were learned last with this `about`, without samples; False where there are none."""
        path = epath.Path(self.folder) / (_text(self._note(about)) or "none")
        if not NAME.fullmatch(path.name) or not path.exists():
            return False
        self._centroids = self._read(path)
        return True

    def _note(self, about: str) -> epath.Path:
        """The file with the name of the centroids' file that was used last."""
        return epath.Path(self.folder) / f"last-{hashlib.sha256(about.encode()).hexdigest()[:16]}.txt"

    def _read(self, path: Any) -> Float[np.ndarray, "codes P"]:
        found, wanted = read_npy(local_copy(path)), (self.codes, self.before.spec.features)
        if found.shape != wanted or not np.isfinite(found).all():
            raise ValueError(f"{os.fspath(path)!r} has no finite centroids of {wanted}, but an array of {found.shape}")
        return found.astype(np.float32)

    def fingerprint(self) -> str:
        """Sixteen hex digits of the centroids: another one where a code stands for something else."""
        return hashlib.sha256(self.centroids.tobytes()).hexdigest()[:16]

    def encode(self, value: Float[Array, "*B N P"]) -> Int[Array, "*B N"]:
        """Ids of the nearest centroids; the first of equals."""
        centroids = jnp.asarray(self.centroids)
        products = jnp.einsum("...p,kp->...k", value, centroids, precision=jax.lax.Precision.HIGHEST)
        return jnp.argmin((centroids**2).sum(-1) - 2 * products, axis=-1).astype(jnp.int32)

    def decode(self, tokens: Int[Array, "*B N"]) -> Float[Array, "*B N P"]:
        """The centroids of ids."""
        return jnp.asarray(self.centroids)[tokens]


def _text(path: epath.Path) -> str:
    """What a small file says; "" without one."""
    return path.read_text() if path.exists() else ""


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
