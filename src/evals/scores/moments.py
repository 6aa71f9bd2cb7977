"""Mean and covariance of features in one pass, in float64."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float


@dataclasses.dataclass
class FeatureMoments:
    """Moments of the rows [d] seen so far.

    count    rows
    mean     [d], zeros without rows
    scatter  [d, d], the sum of the outer products of the rows' deviations from the mean

    Parts of a data set give the moments of the whole by `merge`, in any order and on any number of processes (Chan,
    Golub and LeVeque 1983, eq. 2.1), up to rounding in float64.
    """

    count: int
    mean: Float[np.ndarray, " d"]
    scatter: Float[np.ndarray, "d d"]

    @classmethod
    def none(cls, features: int) -> FeatureMoments:
        """The moments of no rows of `features` numbers."""
        return cls(0, np.zeros(features), np.zeros((features, features)))

    @classmethod
    def of(cls, rows: Float[np.ndarray, "n d"]) -> FeatureMoments:
        """The moments of these rows."""
        rows = np.asarray(rows, np.float64)
        if not len(rows):
            return cls.none(rows.shape[1])
        mean = rows.mean(axis=0)
        apart = rows - mean
        return cls(len(rows), mean, apart.T @ apart)

    def merge(self, other: FeatureMoments) -> FeatureMoments:
        """The moments of the rows of both. Raises ValueError for rows of another length."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} features cannot be merged")
        count = self.count + other.count
        if not count:
            return self
        apart = other.mean - self.mean
        mean = self.mean + apart * (other.count / count)
        between = np.outer(apart, apart) * (self.count * other.count / count)
        return FeatureMoments(count, mean, self.scatter + other.scatter + between)

    def covariance(self) -> Float[np.ndarray, "d d"]:
        """Unbiased, as the published scores have it. Raises ValueError for less than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 rows, not {self.count}")
        return self.scatter / (self.count - 1)
