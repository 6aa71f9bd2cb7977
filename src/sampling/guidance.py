"""Classifier-free guidance: guided = null + scale (cond - null) on the outputs of a head.

Sources: Ho & Salimans 2022; Kynkäänniemi et al. 2024 (interval); Lin et al. 2023, section 3.4 (rescale); Chang
et al. 2023 "Muse" (ramp).
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """Combines the outputs with and without conditions.

    scale      1: the conditional output, 0: the unconditional one
    interval   times (lo, hi), inclusive, with guidance; at other times the output is the conditional one
    ramp       in [0, 1]: at time t the scale is scale - ramp (scale - 1) t, so that with 1 it rises from none
    rescale    phi in [0, 1]: interpolates the guided outputs to the standard deviation of the conditional ones
    features   number of features of vectors that are guided, the first ones (official DiT and MonoFormer: those of 3 of
               4 channels); 0: all

    Raises ValueError for an empty interval, a rescale or ramp outside [0, 1] and a negative number of features.
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    ramp: float = 0.0
    rescale: float = 0.0
    features: int = 0

    def __post_init__(self):
        if not self.interval[0] <= self.interval[1]:
            raise ValueError(f"guidance.interval={tuple(self.interval)} is empty; give (lo, hi) with lo <= hi")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"guidance.rescale={self.rescale}; give a value between 0 and 1")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"guidance.ramp={self.ramp}; give a value between 0 and 1")
        if self.features < 0:
            raise ValueError(f"guidance.features={self.features}; give 0 for all, or a number of features")
        object.__setattr__(self, "interval", tuple(self.interval))

    def __call__(
        self, cond: Float[Array, "B *N O"], null: Float[Array, "B *N O"], t: ArrayLike, guided: int | None = None
    ) -> Float[Array, "B *N O"]:
        """The guided output at the scalar time t; only the first `guided` numbers differ from `cond`."""
        width = cond.shape[-1] if guided is None else guided
        c, n = cond[..., :width], null[..., :width]
        full = self._rescaled(n + (self.scale - self.ramp * (self.scale - 1) * t) * (c - n), c)
        inside = (jnp.asarray(t) >= self.interval[0]) & (jnp.asarray(t) <= self.interval[1])
        return jnp.concatenate([jnp.where(inside, full, c), cond[..., width:]], axis=-1)

    def _rescaled(self, guided: Float[Array, "B *N O"], cond: Float[Array, "B *N O"]) -> Float[Array, "B *N O"]:
        """phi guided std(cond) / std(guided) + (1 - phi) guided, with the standard deviation of each row."""
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, guided.ndim))
        ratio = cond.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-12)
        return (self.rescale * ratio + 1 - self.rescale) * guided


def paired(cond: Array | np.ndarray, null: Array | np.ndarray) -> Array:
    """Rows `[B, …]` with conditions and without as `[2 B, …]`, each pair side by side: where rows are split over
    devices, both of a pair are on one."""
    return jnp.stack([cond, null], axis=1).reshape(2 * cond.shape[0], *cond.shape[1:])


def pairs(rows: Array) -> tuple[Array, Array]:
    """What `paired` joined."""
    both = rows.reshape(rows.shape[0] // 2, 2, *rows.shape[1:])
    return both[:, 0], both[:, 1]
