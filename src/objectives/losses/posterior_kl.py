"""KL(q(x_s | x_t, x_0) || p(x_s | x_t)) of a categorical process, the bound in discrete time.

With s = t - 1/T and t uniform on the T times, the mean of T · KL is the bound in nats per token; at s = 0 the KL is
-log p(x_0 | x_t). The prior's term is 0, since the prior is q(x_1).

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

TINY = 1e-32  # smallest probability whose logarithm is taken: its gradient T / TINY is finite in float32
SNAP = 1e-3  # in units of one step: float32 errors of t T are far below it


@dataclasses.dataclass(frozen=True, kw_only=True)
class PosteriorKL:
    """`kl` of each token, T · KL in nats; the mean over the ids of a token.

    steps       T; times off the grid also have s = t - 1/T, at least 0
    auxiliary   weight of -log p(x_0 | x_t), added for every token

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
