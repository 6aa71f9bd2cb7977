"""Categorical processes whose share of masks depends on the time: VQ-Diffusion's tables, GIDD's hybrid noise, and masks
with wrong ids among the tokens between them.

Sources: Gu et al. 2022 "VQ-Diffusion"; von Rütte et al. 2025 "GIDD"; Zhang et al. 2023 "Copilot4D".
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from src.common.rng import stream
from src.corruption.base import expand
from src.corruption.categorical import Categorical
from src.corruption.keep import LinearDecay
from src.corruption.schedules import as_time
from src.interfaces import Corrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskAndUniform(Categorical):
    """A categorical process that defines `masses` itself.

    Raises ValueError for a `schedule` or a share `mask`, which these processes have already.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.mask != 1 or self.schedule != LinearDecay():
            raise ValueError(f"{type(self).__name__} has its own schedule and share of masks: give neither of the two.")

    def rate(self, t: ArrayLike, soften: float = 0.0) -> Float[Array, "..."]:
        """Raises ValueError: the bound is no weighted cross-entropy."""
        raise ValueError(
            f"The bound of {type(self).__name__} is no weighted cross-entropy: take posterior_kl, or gidd for GIDD."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class VQDiffusion(MaskAndUniform):
    """abar and the mass of the mask are linear over T steps, at t = 1/T … 1, and linear before; a mask stays.

    steps   T
    keep    abar at t = 1/T and at t = 1
    masked  mass of the mask there

    Raises ValueError for steps < 2, and for values that are no shares or move the wrong way.
    """

    absorbing: bool = True
    steps: int = 100
    keep: tuple[float, float] = (0.99999, 9e-6)
    masked: tuple[float, float] = (9e-6, 0.99999)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "keep", tuple(self.keep))
        object.__setattr__(self, "masked", tuple(self.masked))
        (first, last), (few, many) = self.keep, self.masked
        if self.steps < 2 or not 1 >= first > last >= 0 or not 0 <= few <= many or first + few > 1 or last + many > 1:
            raise ValueError(
                f"VQDiffusion: steps={self.steps} must be at least 2, keep={self.keep} fall and masked={self.masked} "
                "rise within [0, 1], with sums of at most 1."
            )

    def masses(self, t: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """Probabilities of a kept, a masked and a replaced token."""
        index = as_time(t) * self.steps  # k + 1 of step k
        early, late = jnp.minimum(index, 1.0), jnp.maximum(index - 1, 0.0) / (self.steps - 1)
        (first, last), (few, many) = self.keep, self.masked

        def table(one: float, other: float, start: float) -> Array:
            return jnp.where(index < 1, start * (1 - early) + one * early, one * (1 - late) + other * late)

        return table(first, last, 1.0), table(few, many, 0.0), table(1 - first - few, 1 - last - many, 0.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GIDD(MaskAndUniform):
    """abar = (1 - t) / (1 + c), masked t / (1 + c), replaced c / (1 + c), with c = B sqrt(t (1 - t)).

    share   of replaced tokens at t = 1/2; B = 2 share / (1 - share). 0: only masks

    Raises ValueError for a share outside [0, 1).
    """

    share: float | int = 0.1

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.share < 1:
            raise ValueError(f"GIDD: share is {self.share}; give one of [0, 1).")

    def masses(self, t: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """Probabilities of a kept, a masked and a replaced token."""
        t = as_time(t)
        c = 2 * self.share / (1 - self.share) * jnp.sqrt(t * (1 - t))
        return (1 - t) / (1 + c), t / (1 + c), c / (1 + c)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskAndWrong(MaskAndUniform):
    """Masked sin(pi t / 2), MaskGIT's schedule; of the other tokens a share r of the row is replaced by draws over the
    vocabulary, with r uniform on [0, wrong] for each row (Copilot4D). So the network learns to take tokens back.

    `masses` are those of the mean of r, for one token; with them the chain of a token is exact. Its wrong ids come in
    the first moment after t = 0, so that the last step of any sampler takes all of them back at once.

    wrong   the largest r (Copilot4D: 0.2); 0: MaskGIT's masks

    Raises ValueError for a share outside [0, 1).
    """

    wrong: float | int = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.wrong < 1:
            raise ValueError(f"MaskAndWrong: wrong is {self.wrong}; give one of [0, 1).")

    def masses(self, t: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """Probabilities of a kept, a masked and a replaced token."""
        t = as_time(t)
        mask = jnp.sin(jnp.pi / 2 * t)
        rest = jnp.where(t > 0, (1 - mask) * self.wrong / 2, 0.0)
        return 1 - mask - rest, mask, rest

    def noise(self, key: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        """That of `Categorical`, and r of each row."""
        own = jax.random.uniform(stream(key, "wrong"), (shape[0], 1), maxval=float(self.wrong))
        return super().noise(key, shape) | {"wrong": own}

    def corrupt(self, x0: Int[Array, "*B"], noise: dict[str, Array], t: ArrayLike) -> Corrupted:
        """Each token by its uniform number u: masked if u < m, wrong if u < m + (1 - m) r, else kept."""
        t_each, u = expand(t, x0), noise["uniform"]
        _, mask, _ = self.masses(t_each)
        wrong = mask + (1 - mask) * jnp.where(t_each > 0, expand(noise["wrong"], x0), 0.0)
        xt = jnp.where(u < mask, noise["mask"], jnp.where(u < wrong, noise["other"], x0))
        return Corrupted(x0=x0, xt=xt.astype(x0.dtype), t=t, noise=noise)
