"""The continuous-time bound of a categorical process whose kernel is a moving mixture (GIDD), in nats per token for t
uniform on [0, 1]:

    E_t E_{x_t}  w(x_t) (KL(q_t(. | x_0) || q_t(. | p)) + r - log r - 1),   r = q_t(x_t | x_0) / q_t(x_t | p),

with p = p(x_0 | x_t), q_t(. | p) = a p + b, and w(x) = (b'(x) - (a' / a) b(x)) / q_t(x | x_0), the rate at which noise
turns other ids into x. It is the limit of the discrete-time bound of the step q(x_s | x_t, p) = q(x_t | x_s) q_s(x_s |
p) / q_t(x_t | p). For a process with masks only it is the weighted cross-entropy.

Source: von Rütte et al. 2025 "GIDD" (theorem 3.1).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.corruption.base import expand
from src.corruption.categorical import Categorical
from src.interfaces import Corrupted

TINY = 1e-12  # smallest probability that is divided by: the gradient 1 / TINY² stays finite in float32
END = 1e-4  # times are kept so far from both ends, where a / a' or b' may be infinite


@dataclasses.dataclass(frozen=True, kw_only=True)
class MixtureBound:
    """`bound` of each token, the mean over its ids.

    clip   the weight w is at most so much (GIDD trains with 2); 0: no limit, the bound itself

    Raises ValueError for a negative clip.
    """

    needs: ClassVar[tuple[str, ...]] = ("masses", "spread", "mass_at", "logits")
    clip: float | int = 0.0

    def __post_init__(self):
        if self.clip < 0:
            raise ValueError(f"MixtureBound: clip is {self.clip}; give 0 or more.")

    def __call__(
        self, process: Categorical, output: Float[Array, "B N O"], c: Corrupted, target: Int[Array, "B N *P"]
    ) -> dict[str, Float[Array, "B N"]]:
        """Losses by name. Raises ValueError for a process in which masks stay masks, or replace by distance."""
        stays = process.absorbing or process.rehash
        if (stays and process.mask != 1) or type(process).arrival is not Categorical.arrival:
            raise ValueError(f"The bound of GIDD is not that of {type(process).__name__}: take posterior_kl.")
        t = jnp.clip(expand(c.t, c.xt), END, 1 - END)
        truth = process.spread(jax.nn.one_hot(c.x0, process.field.vocab), t)
        model = process.spread(jnp.exp(process.logits(output)), t)
        kl = (truth * (_log(truth) - _log(model))).sum(axis=-1)
        here = lambda q: jnp.take_along_axis(q, c.xt[..., None], axis=-1)[..., 0]
        ratio = here(truth) / jnp.maximum(here(model), TINY)
        each = self.weight(process, c, t, here(truth)) * (kl + ratio - _log(ratio) - 1)
        each = jnp.where(here(truth) > 0, each, 0.0)
        return {"bound": each.reshape(*each.shape[:2], -1).mean(axis=-1)}

    def weight(
        self, process: Categorical, c: Corrupted, t: Float[Array, "..."], q: Float[Array, "*B"]
    ) -> Float[Array, "*B"]:
        """w(x_t) at times inside (0, 1)."""
        (a, mask, rest), (da, dmask, drest) = jax.jvp(process.masses, (t,), (jnp.ones_like(t),))
        decay = -da / jnp.maximum(a, TINY)
        rate = process.mass_at(c.xt, dmask + decay * mask, drest + decay * rest)
        weight = jnp.maximum(rate, 0.0) / jnp.maximum(q, TINY)
        return jnp.minimum(weight, self.clip) if self.clip else weight


def _log(p: Array) -> Array:
    return jnp.log(jnp.maximum(p, TINY))
