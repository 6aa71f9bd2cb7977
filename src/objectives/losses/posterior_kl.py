"""KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of a categorical process, the bound in discrete time.

With s = t - 1/T and t uniform on the T times, T times the divergence is the bound in nats per token; at s = 0 it is
-log p(x_0 | x_t). A prior that is q(x_1) adds nothing.

Sources: Austin et al. 2021 "D3PM" (also the auxiliary term); Gu et al. 2022 "VQ-Diffusion".
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.corruption.categorical import Categorical
from src.interfaces import Corrupted

TINY = 1e-32  # smallest probability whose logarithm is taken: T / TINY, in its gradient, is a float32 still
SNAP = 1e-3  # in units of one step: float32 errors of t T are far below it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosteriorKL:
    """`kl` of each token, T times the divergence in nats; of several numbers the mean.

    steps       T; times off the grid have a jump of 1/T, too, and none below 0
    auxiliary   what -log p(x_0 | x_t) of every token adds, times this

    Raises ValueError for steps < 1.
    """

    needs: ClassVar[tuple[str, ...]] = ("reverse", "logits")
    steps: int = 1000
    auxiliary: float | int = 0.0

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"PosteriorKL: steps is {self.steps}; give at least 1.")

    def __call__(
        self, process: Categorical, output: Float[Array, "B N O"], c: Corrupted, target: Int[Array, "B N *P"]
    ) -> dict[str, Float[Array, "B N"]]:
        """Losses by name."""
        index = c.t * self.steps - 1
        s = jnp.where(index < SNAP, 0.0, index / self.steps)
        truth = process.reverse(c.xt, jax.nn.one_hot(c.x0, process.field.vocab), c.t, s)
        model = process.reverse(c.xt, jnp.exp(process.estimate(output, c.xt, c.t)), c.t, s)
        kl = self.steps * (truth * (_log(truth) - _log(model))).sum(axis=-1)
        if self.auxiliary:
            kl = kl - self.auxiliary * jnp.take_along_axis(process.logits(output), target[..., None], axis=-1)[..., 0]
        return {"kl": kl.reshape(*kl.shape[:2], -1).mean(axis=-1)}


def _log(p: Array) -> Array:
    return jnp.log(jnp.maximum(p, TINY))
