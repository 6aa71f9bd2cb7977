"""The categorical corruption process: a token is kept, masked, or replaced by a draw from a fixed distribution.

1. q(x_t | x_0) = a_t [x_t = x_0] + b_t(x_t), with a_t = abar(t) and the added mass b_t: m_t, evenly over the mask ids,
   and 1 - a_t - m_t, distributed over the vocabulary. Here m_t = mask (1 - a_t).
2. A jump s -> t keeps a_ts = a_t / a_s and adds b_ts = b_t - a_ts b_s. With `absorbing` a mask stays a mask: then, from
   the vocabulary, the mask ids get c_ts = (m_t - m_s) / (1 - m_s) and the vocabulary 1 - a_ts - c_ts.
3. Bayes, for a token x_t and p(x_0) = p(x_0 | x_t):  with r(x_0) = p(x_0) / q(x_t | x_0) and R = sum r,
       p(x_s = j | x_t) = q(x_t | x_s = j) (a_s r(j) + b_s(j) R),   q(x_t | x_s = j) = a_ts [j = x_t] + b_ts(x_t).
   At s = 0 this is p(j) itself. Kernels of another form override `likelihood`, `spread` and `arrival` (`distance.py`).

Sources: Austin et al. 2021 "D3PM" (absorbing, uniform), Gu et al. 2022 "VQ-Diffusion" (mask + uniform, absorbing),
Sahoo et al. 2024 "MDLM" (known tokens carried over), Vignac et al. 2023 "DiGress" (marginal distribution), von Rütte et
al. 2025 "GIDD" (2 in this form), Ma et al. 2025 "ReDDiT" (several mask ids, rehash).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from src.corruption.base import ProcessBase, expand
from src.corruption.keep import LinearDecay
from src.interfaces import Corrupted, FieldSpec

TINY = 1e-37  # smallest probability whose logarithm is taken: smaller ones may be flushed to 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Categorical(ProcessBase):
    """A process on ids [B, N], or [B, N, P] where a token has P = `features` ids below `vocab`, each independent.

    field       spec of the ids; the mask ids are vocab ... vocab + masks - 1
    schedule    abar(t), a class of `keep.py`
    mask        share of the replaced tokens that becomes a mask; 1: only masks, 0: there is no mask id
    masks       number of mask ids, drawn evenly
    marginal    distribution over the vocabulary, `vocab` weights; None: uniform
    absorbing   a mask stays a mask in every jump; no effect on q(x_t | x_0), nor with one mask id and mask = 1
    rehash      and draws its mask id anew in every jump (ReDDiT); no effect on q(x_t | x_0), nor with one mask id
    carry_over  known tokens have probability 1 in `estimate` (MDLM's SUBS); False: what the head says, for samplers
                that take tokens back

    Raises ValueError for a field without a vocabulary, a share outside [0, 1], weights that cannot be normalized, and a
    schedule by place that is not of the field's tokens.
    """

    field: FieldSpec
    schedule: Any = dataclasses.field(default_factory=LinearDecay)
    mask: float | int = 1.0
    masks: int = 1
    marginal: Sequence[float | int] | None = None
    absorbing: bool = False
    rehash: bool = False
    carry_over: bool = True

    def __post_init__(self):
        if self.field.vocab is None:
            raise ValueError(f"Categorical: the field must have ids (a vocab), but it has {self.field}.")
        if not 0 <= self.mask <= 1 or self.masks < 1:
            raise ValueError(f"Categorical: mask={self.mask} must lie in [0, 1], and masks={self.masks} be at least 1.")
        if self.schedule.places not in (None, math.prod(self.field.grid)) or (
            self.schedule.places is not None and (self.field.features is not None or not self.field.grid)
        ):
            raise ValueError(
                f"Categorical: the schedule has {self.schedule.places} places, but the field is {self.field}; give one "
                "number for each token of a fixed grid of single ids."
            )
        if self.marginal is None:
            return
        weights = tuple(float(w) for w in self.marginal)
        if len(weights) != self.field.vocab or not sum(weights) > 0 or min(weights) < 0:
            raise ValueError(f"Categorical: marginal has {len(weights)} weights; give {self.field.vocab}, all >= 0.")
        object.__setattr__(self, "marginal", tuple(w / sum(weights) for w in weights))

    # ---- ids and outputs

    @property
    def ids(self) -> int:
        """Number of ids: vocabulary and masks."""
        return self.field.vocab + (self.masks if self.mask > 0 else 0)

    @property
    def inputs(self) -> FieldSpec:
        """The field with the mask ids in its vocabulary."""
        return dataclasses.replace(self.field, vocab=self.ids)

    @property
    def outputs(self) -> int:
        """Logits over the vocabulary, for each id of a token."""
        return self.field.vocab * (self.field.features or 1)

    def masses(self, t: Float[Array, "..."]) -> tuple[Array, Array, Array]:
        """Probabilities a_t, m_t and 1 - a_t - m_t of a kept, a masked and a replaced token.

        A subclass overrides them for a share of masks that depends on t (VQ-Diffusion, GIDD).
        """
        keep = self.schedule.keep(t)
        return keep, self.mask * (1 - keep), (1 - self.mask) * (1 - keep)

    def distribution(self) -> Float[np.ndarray, " V"]:
        """Distribution of replaced tokens over the vocabulary."""
        vocab = self.field.vocab
        return np.full(vocab, 1 / vocab, np.float32) if self.marginal is None else np.float32(self.marginal)

    # ---- forward

    def noise(self, key: Array, shape: tuple[int, ...]) -> dict[str, Array]:
        """A uniform number, a mask id and a draw from `distribution` for each id."""
        uniform, mask, other = jax.random.split(key, 3)
        shape = shape if self.field.features is None else (*shape, self.field.features)
        if self.marginal is None:
            drawn = jax.random.randint(other, shape, 0, self.field.vocab)
        else:
            drawn = jax.random.categorical(other, jnp.log(jnp.maximum(self.distribution(), TINY)), shape=shape)
        masks = jax.random.randint(mask, shape, 0, self.masks) + self.field.vocab
        return {"uniform": jax.random.uniform(uniform, shape), "mask": masks, "other": drawn}

    def corrupt(self, x0: Int[Array, "*B"], noise: dict[str, Array], t: ArrayLike) -> Corrupted:
        """Each token by its uniform number u: kept if u < a_t, masked if u < a_t + m_t, else replaced."""
        keep, mask, _ = self.masses(expand(t, x0))
        replaced = jnp.where(noise["uniform"] < keep + mask, noise["mask"], noise["other"])
        xt = jnp.where(noise["uniform"] < keep, x0, replaced).astype(x0.dtype)
        return Corrupted(x0=x0, xt=xt, t=t, noise=noise)

    def sample_replaced(self, key: Array, shape: tuple[int, ...], t: ArrayLike) -> Int[Array, "*B"]:
        """Draws of x_t given that the token was masked or replaced."""
        noise = self.noise(key, shape)
        _, mask, rest = self.masses(expand(t, noise["mask"]))
        share = jnp.where(mask + rest > 0, mask / jnp.maximum(mask + rest, TINY), self.mask)
        return jnp.where(noise["uniform"] < share, noise["mask"], noise["other"]).astype(jnp.int32)

    def prior(self, key: Array, shape: tuple[int, ...], past: Array | None = None) -> Int[Array, "*B"]:
        """Draws of x at t = 1, with no token kept."""
        return self.sample_replaced(key, shape, 1.0)

    def mass_at(
        self, x: Int[Array, "..."], mask: Float[Array, "..."], rest: Float[Array, "..."]
    ) -> Float[Array, "..."]:
        """Mass at id x when `mask` is spread over the mask ids and `rest` over the vocabulary."""
        drawn = jnp.asarray(self.distribution())[jnp.minimum(x, self.field.vocab - 1)]
        return jnp.where(x < self.field.vocab, rest * drawn, mask / self.masks)

    # ---- backward

    def known(self, xt: Int[Array, "*B"], t: ArrayLike) -> Bool[Array, "*B"]:
        """Whether x_t must equal x_0: it is no mask, and replacement has no mass at it."""
        _, _, rest = self.masses(expand(t, xt))
        return (xt < self.field.vocab) & (self.mass_at(xt, jnp.zeros(()), rest) == 0)

    def logits(self, output: Float[Array, "... O"]) -> Float[Array, "... V"]:
        """Log-probabilities of a head's output, float32."""
        output = output.astype(jnp.float32)
        if self.field.features is not None:
            output = output.reshape(*output.shape[:-1], self.field.features, self.field.vocab)
        return jax.nn.log_softmax(output, axis=-1)

    def estimate(self, output: Float[Array, "... O"], xt: Int[Array, "*B"], t: ArrayLike) -> Float[Array, "*B V"]:
        """log p(x_0 | x_t), at least log TINY; with `carry_over` a known token has probability 1."""
        logs = jnp.maximum(self.logits(output), np.log(TINY))
        if not self.carry_over:
            return logs
        certain = jnp.where(jnp.arange(self.field.vocab) == xt[..., None], 0.0, np.log(TINY))
        return jnp.where(self.known(xt, t)[..., None], certain, logs)

    def hint(self, estimate: Float[Array, "*B V"]) -> Float[Array, "..."]:
        """Probabilities; those of a token's P ids concatenated."""
        p = jnp.exp(estimate)
        return p if self.field.features is None else p.reshape(*p.shape[:-2], -1)

    def jump(self, xt: Int[Array, "*B"], t: Array, s: Array) -> tuple[Array, Array, Array]:
        """For the jump s -> t: a_ts, b_ts(x_t), and q(x_t | x_s) for a mask x_s other than x_t."""
        (keep_t, mask_t, rest_t), (keep_s, mask_s, rest_s) = self.masses(t), self.masses(s)
        keep = jnp.where(keep_s > 0, keep_t / jnp.maximum(keep_s, TINY), 1.0)  # 0/0 if no token is kept at s
        if not (self.absorbing or self.rehash):
            mask, rest = (jnp.maximum(x, 0.0) for x in (mask_t - keep * mask_s, rest_t - keep * rest_s))
            b = self.mass_at(xt, mask, rest)
            return keep, b, b
        mask = (mask_t - mask_s) / jnp.maximum(1 - mask_s, TINY)
        rest = jnp.maximum(rest_t - rest_s * (1 - mask), 0.0)  # joint with "not masked at s"
        rest = jnp.where(keep_s > 0, rest / jnp.maximum(keep_s, TINY), 0.0)
        renamed = self.rehash & (t > s) & (xt >= self.field.vocab)
        return keep, self.mass_at(xt, mask, rest), jnp.where(renamed, 1 / self.masks, 0.0)

    def likelihood(self, xt: Int[Array, "*B"], t: Float[Array, "..."]) -> Float[Array, "*B V"]:
        """q(x_t | x_0) for every x_0."""
        keep, mask, rest = self.masses(t)
        same = xt[..., None] == jnp.arange(self.field.vocab)
        return keep[..., None] * same + self.mass_at(xt, mask, rest)[..., None]

    def spread(self, r: Float[Array, "*B V"], s: Float[Array, "..."]) -> Float[Array, "*B K"]:
        """The sum over x_0 of r(x_0) q(x_s = j | x_0), for every id j."""
        keep, mask, rest = (x[..., None] for x in self.masses(s))
        drawn = self.mass_at(jnp.arange(self.ids), mask, rest) * r.sum(axis=-1, keepdims=True)
        return drawn + jnp.pad(keep * r, [(0, 0)] * (r.ndim - 1) + [(0, self.ids - self.field.vocab)])

    def arrival(self, xt: Int[Array, "*B"], t: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "*B K"]:
        """q(x_t | x_s = j) for every id j."""
        every = jnp.arange(self.ids)
        kept, drawn, from_mask = (x[..., None] for x in self.jump(xt, t, s))
        stays = kept
        if self.absorbing or self.rehash:
            mask = jnp.where((t > s)[..., None], 0.0, 1.0) if self.rehash else 1.0
            stays = jnp.where(every < self.field.vocab, kept, mask)
        return stays * (xt[..., None] == every) + jnp.where(every < self.field.vocab, drawn, from_mask)

    def reverse(
        self, xt: Int[Array, "*B"], p: Float[Array, "*B V"], t: ArrayLike, s: ArrayLike
    ) -> Float[Array, "*B K"]:
        """p(x_s | x_t) over all ids from p = p(x_0 | x_t), by Bayes (docstring of the module, 3), for any 0 <= s <= t.

        A token with q(x_t | x_0) = 0 for every x_0 is kept.
        """
        t, s = expand(t, xt), expand(s, xt)
        q = self.likelihood(xt, t)
        r = jnp.where(q > 0, p / jnp.maximum(q, TINY), 0.0)
        joint = self.spread(r, s) * self.arrival(xt, t, s)
        total = joint.sum(axis=-1, keepdims=True)
        return jnp.where(total > 0, joint / jnp.maximum(total, TINY), xt[..., None] == jnp.arange(self.ids))

    def posterior(
        self, key: Array, xt: Int[Array, "*B"], estimate: Float[Array, "*B V"], t: ArrayLike, s: ArrayLike
    ) -> Int[Array, "*B"]:
        """One draw from p(x_s | x_t), never an id of probability 0."""
        p = self.reverse(xt, jnp.exp(estimate), t, s)
        logs = jnp.where(p > 0, jnp.log(jnp.maximum(p, TINY)), -jnp.inf)
        return jax.random.categorical(key, logs, axis=-1).astype(xt.dtype)

    def rate(self, t: ArrayLike, soften: float = 0.0) -> Float[Array, "..."]:
        """-abar' / (1 - abar + soften abar); without `soften` the weight of a masked token's log-likelihood in the
        bound, 0 at t = 0.

        Raises ValueError unless mask = 1, since other processes have another bound.
        """
        if self.mask != 1:
            raise ValueError(f"The bound is a weighted cross-entropy only for mask=1, not for mask={self.mask}.")
        t = jnp.asarray(t)
        keep = self.schedule.keep(t)
        return jnp.where(t > 0, -self.schedule.slope(t) / jnp.maximum(1 - keep + soften * keep, TINY), 0.0)
