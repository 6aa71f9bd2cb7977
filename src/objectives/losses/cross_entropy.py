"""Cross-entropy of the clean tokens under a categorical head.

With `elbo` it is the continuous-time bound of a process with masks only, in nats per token for t uniform on [0, 1]:
    E_t  -abar'(t) / (1 - abar(t)) [x_t is masked] (-log p(x_0 | x_t)).

Sources: Chang et al. 2022 "MaskGIT" (changed); Shi et al. 2024 "MD4" and Sahoo et al. 2024 "MDLM" (elbo); Ma et al.
2025 "ReDDiT" (soften); Hang et al. 2023 "Min-SNR" (clip); Zhang et al. 2023 "Copilot4D" (all, smoothing).
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

    on        changed: 0 where x_t = x_0, so the mean over all targets is the mean over changed ones times their share;
              all: every token
    elbo      weighted to the bound, on changed tokens
    soften    of the weight of `elbo`: -abar' / (1 - abar + soften abar) (ReDDiT: 0.2)
    clip      the weight of `elbo` is at most so much; 0: no limit
    smoothing share of the target's probability that is spread evenly over the vocabulary (Copilot4D: 0.1)

    Raises ValueError for an unknown `on`, the bound on all tokens, a changed weight without `elbo`, and numbers out of
    range.
    """

    needs: ClassVar[tuple[str, ...]] = ("logits",)
    on: str = "changed"
    elbo: bool = False
    soften: float | int = 0.0
    clip: float | int = 0.0
    smoothing: float | int = 0.0

    def __post_init__(self):
        if self.on not in ON:
            raise ValueError(f"CrossEntropy: on={self.on!r} is unknown; take one of {ON}.")
        if self.elbo and self.on != "changed":
            raise ValueError("CrossEntropy: the bound needs on='changed'; give that, or elbo=False.")
        if (self.soften or self.clip) and not self.elbo:
            raise ValueError("CrossEntropy: soften and clip change the weight of the bound; give elbo=True, too.")
        if self.soften < 0 or self.clip < 0 or not 0 <= self.smoothing < 1:
            raise ValueError(
                f"CrossEntropy: soften={self.soften} and clip={self.clip} must be at least 0, smoothing="
                f"{self.smoothing} in [0, 1)."
            )

    def __call__(
        self, process: Process, output: Float[Array, "B N O"], c: Corrupted, target: Int[Array, "B N *P"]
    ) -> dict[str, Float[Array, "B N"]]:
        """Losses by name. Raises ValueError for the bound of a process with mask < 1."""
        logs = jax.nn.log_softmax(output.astype(jnp.float32).reshape(*target.shape, -1), axis=-1)
        nll = -jnp.take_along_axis(logs, target[..., None], axis=-1)[..., 0]
        if self.smoothing:
            nll = (1 - self.smoothing) * nll - self.smoothing * logs.mean(axis=-1)
        if self.elbo:
            weight = process.rate(expand(c.t, nll), self.soften)
            nll = nll * (jnp.minimum(weight, self.clip) if self.clip else weight)
        if self.on == "changed":
            nll = jnp.where(c.xt != c.x0, nll, 0.0)
        return {"nll": nll.reshape(*nll.shape[:2], -1).mean(axis=-1)}
