"""Cross-entropy of the clean tokens under a categorical head.

With `elbo` it is the continuous-time bound of a process with masks only, in nats per token for t uniform on [0, 1]:
    E_t  -abar'(t) / (1 - abar(t)) [x_t is masked] (-log p(x_0 | x_t)).

Sources: Chang et al. 2022 "MaskGIT" (changed); Shi et al. 2024 "MD4" and Sahoo et al. 2024 "MDLM" (elbo).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.corruption.base import expand
from src.interfaces import Corrupted, Process

ON = ("changed", "all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CrossEntropy:
    """`nll` of each token, in nats; the mean over the ids of a token.

    on     changed: 0 where x_t = x_0, so the mean over all targets is the mean over changed ones times their share;
           all: every token
    elbo   weighted to the bound, on changed tokens

    Raises ValueError for an unknown `on`, or the bound on all tokens.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)
    on: str = "changed"
    elbo: bool = False

    def __post_init__(self):
        if self.on not in ON:
            raise ValueError(f"CrossEntropy: on={self.on!r} is unknown; take one of {ON}.")
        if self.elbo and self.on != "changed":
            raise ValueError("CrossEntropy: the bound needs on='changed'; give that, or elbo=False.")

    def __call__(
        self, process: Process, output: Float[Array, "B N O"], c: Corrupted, target: Int[Array, "B N *P"]
    ) -> dict[str, Float[Array, "B N"]]:
        """Losses by name. Raises ValueError for the bound of a process with mask < 1."""
        logs = jax.nn.log_softmax(output.astype(jnp.float32).reshape(*target.shape, -1), axis=-1)
        nll = -jnp.take_along_axis(logs, target[..., None], axis=-1)[..., 0]
        if self.elbo:
            nll = nll * process.rate(expand(c.t, nll))
        if self.on == "changed":
            nll = jnp.where(c.xt != c.x0, nll, 0.0)
        return {"nll": nll.reshape(*nll.shape[:2], -1).mean(axis=-1)}
