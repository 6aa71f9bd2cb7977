"""Loss of Blackout Diffusion for a counts process: w(t) (rate - (x_0 - x_t) log rate), rate = E[x_0 - x_t | x_t].

Source: Santos et al. 2023, arXiv 2305.11089, with the weights of its instantaneous and its finite-time form
(`corruption/counts.py`).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.corruption.base import expand
from src.corruption.counts import Counts
from src.interfaces import Corrupted

TINY = 1e-37  # smallest rate whose logarithm is taken
WEIGHTS = ("finite", "instantaneous", "none")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Poisson:
    """`poisson` of each token, the mean over its counts.

    weight   w(t): finite, instantaneous or none (1); the mean over uniform times is about 1 for the first two

    Raises ValueError for an unknown weight.
    """

    needs: ClassVar[tuple[str, ...]] = ("weights",)
    weight: str = "finite"

    def __post_init__(self):
        if self.weight not in WEIGHTS:
            raise ValueError(f"Poisson: weight {self.weight!r} is unknown; take one of {WEIGHTS}.")

    def __call__(
        self, process: Counts, output: Float[Array, "B N P"], c: Corrupted, target: Int[Array, "B N P"]
    ) -> dict[str, Float[Array, "B N"]]:
        """Losses by name."""
        rate = process.estimate(output, c.xt, c.t)
        each = rate - (c.x0 - c.xt) * jnp.log(jnp.maximum(rate, TINY))
        instantaneous, finite = process.weights(expand(c.t, each))
        weight = {"finite": finite, "instantaneous": instantaneous, "none": 1.0}[self.weight]
        return {"poisson": (weight * each).mean(axis=-1)}
