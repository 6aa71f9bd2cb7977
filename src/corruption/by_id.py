"""Masks that depend on the id: important words are masked last, and so generated first.

1. An id v of importance a_v in [0, 1] is kept with probability  abar_v(t) = min(1, (1 - t) (1 + a_v)),  so it is masked
   with clip(t - (1 - t) a_v): never before t = a_v / (1 + a_v). With a = 0 it is the linear schedule.
2. Whether a token is masked now says something of what it is. Bayes, for a mask and p(x_0) = p(x_0 | x_t):
       p(x_s = v | mask) = p(v) (abar_v(s) - abar_v(t)) / (1 - abar_v(t)),   the rest is the mask's.

Sources: DDLM-Sum (1, whose a comes from attention), Shi et al. 2024 "MD4" (2: schedules that depend on the state).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from src.corruption.base import expand
from src.corruption.categorical import TINY, Categorical
from src.corruption.keep import LinearDecay
from src.interfaces import Corrupted

RANK = "rank"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ById(Categorical):
    """Masks alone, `importance` numbers in [0, 1] for the ids, those that lack one have 0.

    With "rank" it is log(1 + v) / log V: an idf of a vocabulary in the order of its words' frequency, which falls as
    1 / rank (Zipf).

    Raises ValueError for numbers outside [0, 1], more than there are ids, and a schedule or kernel of another kind.
    """

    importance: Sequence[float | int] | str = RANK

    def __post_init__(self):
        super().__post_init__()
        if self.mask != 1 or self.masks != 1 or self.schedule != LinearDecay():
            raise ValueError("ById has its own schedule and one mask id: give no mask, masks or schedule.")
        if self.importance == RANK:
            return
        if isinstance(self.importance, str):
            raise ValueError(f"ById: importance={self.importance!r} is unknown; give {RANK!r}, or numbers.")
        found = np.asarray(self.importance, np.float64)
        if found.ndim != 1 or len(found) > self.field.vocab or not ((found >= 0) & (found <= 1)).all():
            raise ValueError(
                f"ById: importance has shape {found.shape}; give up to {self.field.vocab} numbers of [0, 1]."
            )
        object.__setattr__(self, "importance", tuple(found.tolist()))

    @property
    def weights(self) -> Float[np.ndarray, " V"]:
        """a of every id."""
        vocab = self.field.vocab
        if self.importance == RANK:
            return np.float32(np.log1p(np.arange(vocab)) / math.log(max(vocab, 2)))
        return np.pad(np.float32(self.importance), (0, vocab - len(self.importance)))

    def keeps(self, t: Float[Array, "..."]) -> Float[Array, "... V"]:
        """abar_v(t) of every id."""
        return jnp.minimum(1.0, (1 - t[..., None]) * (1 + self.weights))

    def corrupt(self, x0: Int[Array, "*B"], noise: dict[str, Array], t: ArrayLike) -> Corrupted:
        """Each token by its uniform number u: kept if u < abar of its id."""
        t = expand(t, x0)
        keep = jnp.minimum(1.0, (1 - t) * (1 + jnp.asarray(self.weights)[x0]))
        xt = jnp.where(noise["uniform"] < keep, x0, noise["mask"]).astype(x0.dtype)
        return Corrupted(x0=x0, xt=xt, t=t, noise=noise)

    def likelihood(self, xt: Int[Array, "*B"], t: Float[Array, "..."]) -> Float[Array, "*B V"]:
        """q(x_t | x_0) for every x_0."""
        keep = self.keeps(t)
        same = xt[..., None] == jnp.arange(self.field.vocab)
        return jnp.where(xt[..., None] < self.field.vocab, keep * same, 1 - keep)

    def reverse(
        self, xt: Int[Array, "*B"], p: Float[Array, "*B V"], t: ArrayLike, s: ArrayLike
    ) -> Float[Array, "*B K"]:
        """p(x_s | x_t) over all ids from p = p(x_0 | x_t), see 2; a known token stays.

        A mask that no id could be is kept.
        """
        t, s = expand(t, xt), expand(s, xt)
        q = 1 - self.keeps(t)
        r = jnp.where(q > 0, p / jnp.maximum(q, TINY), 0.0)
        shown, hidden = r * (self.keeps(s) - self.keeps(t)), (r * (1 - self.keeps(s))).sum(axis=-1, keepdims=True)
        joint = jnp.concatenate([shown, hidden], axis=-1)
        total = joint.sum(axis=-1, keepdims=True)
        masked = (xt == self.field.vocab)[..., None] & (total > 0)
        return jnp.where(masked, joint / jnp.maximum(total, TINY), xt[..., None] == jnp.arange(self.ids))

    def rate(self, t: ArrayLike, soften: float = 0.0) -> Float[Array, "..."]:
        """Raises ValueError: the weight of the bound depends on the id."""
        raise ValueError("The bound of ById is no weighted cross-entropy: take posterior_kl, or leave out elbo.")
