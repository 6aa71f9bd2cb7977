"""Bins: numbers <-> ids, each dimension between two quantiles of the training data, on the device.

With limits l < u of a dimension and K bins: id = floor((x - l) / (u - l) · K), at least 0 and at most K - 1; numbers
beyond the limits go to the first and last bin. An id stands for the middle of its bin. OpenVLA's action tokens (Kim et
al. 2024), and those of Discrete Diffusion VLA (Liang et al. 2025), have K = 256 and the quantiles 0.01 and 0.99.
"""

from __future__ import annotations

from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Float, Int

from src.codecs.learned_table import LearnedTable
from src.interfaces import FieldSpec


class Bins(LearnedTable):
    """Vectors of P numbers as P tokens each, ids of `bins` equal bins. Without a `path`, `fit` has to be called first.

    before   the link in front, whose tokens are vectors
    low      quantile that is the lower limit, and `high` that of the upper one
    path     a .npy file of limits [P, 2] that were learned already: no training data are read
    folder   where limits are kept that `fit` learns; "": the user's cache

    Raises ValueError for less than 2 bins, quantiles that are none, tokens that are no vectors, and a file with other
    limits; FileNotFoundError without the file.
    """

    kind: ClassVar[str] = "bins"
    what: ClassVar[str] = "the limits"

    def __init__(
        self,
        bins: int,
        before: Any,
        low: float | int = 0.01,
        high: float | int = 0.99,
        path: str = "",
        folder: str = "",
    ):
        if bins < 2 or not 0 <= low < high <= 1:
            raise ValueError(f"bins={bins} must be at least 2, and low={low}, high={high} rise within [0, 1]")
        self.bins, self.low, self.high = bins, low, high
        numbers = getattr(before.spec, "features", None)
        self.open(before, (numbers, 2), path, folder)
        if self._table is not None:
            _check(self._table)
        self.spec = FieldSpec((*(n for n in before.spec.grid if n > 1), numbers), vocab=bins)
        self.shape: tuple[int, ...] = (before.shape[0] * numbers,)

    def options(self) -> str:
        """The quantiles; the number of bins does not change the limits."""
        return f"{self.low} {self.high}"

    def learn(self, samples: Float[np.ndarray, "n P"]) -> Float[np.ndarray, "P 2"]:
        """The limits. Raises ValueError for a dimension whose quantiles are equal."""
        limits = np.float32(np.quantile(samples.astype(np.float64), (self.low, self.high), axis=0).T)
        _check(limits)
        return limits

    def fit(self, samples: Float[np.ndarray, "n P"], about: str = "") -> Bins:
        """As `LearnedTable.fit`. A warning tells of samples that lie further outside the limits than they are wide."""
        super().fit(samples, about)
        lower, upper = self.table.T
        far = np.maximum(lower - samples, samples - upper) > upper - lower
        if far.any():
            at = int(far.sum(axis=0).argmax())
            logging.warning(
                "%d of %d numbers of dimension %d lie far outside its limits %g and %g, such as %g: they become the"
                " first or the last bin; widen low=%g and high=%g if they are meant",
                *(far[:, at].sum(), len(samples), at, lower[at], upper[at], samples[far[:, at], at][0]),
                *(self.low, self.high),
            )
        return self

    def encode(self, value: Float[Array, "*B N P"]) -> Int[Array, "*B M"]:
        """Ids, the P numbers of a vector side by side."""
        lower, upper = jnp.asarray(self.table).T
        ids = jnp.floor((value - lower) / (upper - lower) * self.bins).astype(jnp.int32)
        return jnp.clip(ids, 0, self.bins - 1).reshape(*value.shape[:-2], -1)

    def decode(self, tokens: Int[Array, "*B M"]) -> Float[Array, "*B N P"]:
        """The middles of the bins."""
        lower, upper = jnp.asarray(self.table).T
        ids = tokens.reshape(*tokens.shape[:-1], -1, len(lower))
        return lower + (ids + 0.5) / self.bins * (upper - lower)


def _check(limits: Float[np.ndarray, "P 2"]) -> None:
    equal = np.flatnonzero(~(limits[:, 0] < limits[:, 1]))
    if equal.size:
        at = int(equal[0])
        raise ValueError(
            f"bins cannot divide dimension {at}, whose limits are {limits[at, 0]:g} and {limits[at, 1]:g}: widen low"
            " and high, or leave the dimension out"
        )
