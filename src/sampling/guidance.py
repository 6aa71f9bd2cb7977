"""Classifier-free guidance: guided = null + scale (cond - null) on the network's output.

Sources: Ho & Salimans 2022; Kynkäänniemi et al. 2024 (interval); Lin et al. 2023, section 3.4 (rescale).
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from src.interfaces import Prediction


@dataclasses.dataclass(frozen=True, kw_only=True)
class Guidance:
    """How a conditional and an unconditional prediction are combined.

    scale      1 is the conditional prediction, 0 the unconditional one
    interval   times (lo, hi), both included, in which guidance acts; outside, the conditional prediction is taken
    rescale    phi in [0, 1]: how far the guided values are brought to the standard deviation of the conditional ones
    channels   guide only the first `channels` channels (official DiT and MonoFormer: 3 of 4); None guides all

    Raises ValueError for an empty interval or a rescale outside [0, 1].
    """

    scale: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)
    rescale: float = 0.0
    channels: int | None = None

    def __post_init__(self):
        if not self.interval[0] <= self.interval[1]:
            raise ValueError(f"Guidance: the interval {self.interval} is empty; give (lo, hi) with lo <= hi.")
        if not 0 <= self.rescale <= 1:
            raise ValueError(f"Guidance: rescale is {self.rescale}; give a value between 0 and 1.")

    def __call__(
        self, cond: Prediction, null: Prediction, t: ArrayLike, patch_features_per_channel: int | None = None
    ) -> Prediction:
        """The guided prediction; the variance and all unguided channels are those of `cond`.

        value [B, N, P] has its patch features ordered channel-slowest, P = C * patch_features_per_channel, so the first
        channels are the first features. t is a scalar. Raises ValueError when `channels` is set and
        `patch_features_per_channel` is missing or `channels` exceeds C.
        """
        width = cond.value.shape[-1]
        if self.channels is not None:
            if patch_features_per_channel is None:
                raise ValueError(
                    f"Guidance on {self.channels} channels needs the number of patch features per channel."
                )
            if self.channels * patch_features_per_channel > width:
                raise ValueError(
                    f"Guidance on {self.channels} channels of {patch_features_per_channel} features does not fit "
                    f"{width} patch features; lower `channels`."
                )
            width = self.channels * patch_features_per_channel
        c, n = cond.value[..., :width], null.value[..., :width]
        guided = self._rescaled(n + self.scale * (c - n), c)
        inside = (jnp.asarray(t) >= self.interval[0]) & (jnp.asarray(t) <= self.interval[1])
        value = jnp.concatenate([jnp.where(inside, guided, c), cond.value[..., width:]], axis=-1)
        return Prediction(value=value, variance=cond.variance)

    def _rescaled(self, guided: Float[Array, "B *N P"], cond: Float[Array, "B *N P"]) -> Float[Array, "B *N P"]:
        """phi guided std(cond) / std(guided) + (1 - phi) guided, with the standard deviation of each row."""
        if self.rescale == 0:
            return guided
        axes = tuple(range(1, guided.ndim))
        ratio = cond.std(axes, keepdims=True) / jnp.maximum(guided.std(axes, keepdims=True), 1e-12)
        return (self.rescale * ratio + 1 - self.rescale) * guided
