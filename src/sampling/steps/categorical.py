"""Confidence-based step sampler for the categorical process (for ancestral sampling see `ancestral.py`).

In every step from t to s:
1. each unknown token is drawn from p(x_0 | x_t); with `revise` the known ones are, too;
2. n = floor((1 - abar(s)) n_0) of them, at least one and not all, are masked (or replaced) again; n_0 is the number of
   unknown tokens at the start. With `masks` the n are masked, and n = ceil(m(s) n_0), m the share of masks;
3. these are the n with the lowest confidence log p(drawn) + gumbel s g, with Gumbel noise g; the others are known from
   now on. At s = 0 all are known.
4. With `remask` or `drop` also some known tokens are masked again before s = 0: those whose probability p is now below
   remask (1 - s), or more than `drop` below what it was when they became known.

Sources: Chang et al. 2022 "MaskGIT" (its code has choice_temperature 4.5 for `gumbel`); Xie et al. 2024 "Show-o"; Zhang
et al. 2023 "Copilot4D" (revise); Liang et al. 2025 "Discrete Diffusion VLA" (4; the form of the threshold is our
reading, its schedule is not published).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from src.corruption.base import expand
from src.corruption.categorical import Categorical
from src.interfaces import PyTree
from src.sampling.steps.base import TimelineBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(TimelineBase):
    """Keeps the most confident tokens first. The log-probabilities of a token's ids are summed.

    gumbel     scale of the noise at t = 1, annealed to 0; without noise, samples do not follow the model's distribution
    compound   multiply the scale by s in every step, instead of gumbel · s (the published Show-o)
    of_all     n_0 is the number of all tokens (the published Show-o)
    masks      count the masks of the process alone, and put back masks alone (Copilot4D)
    revise     known tokens are drawn and chosen anew as the others are (Copilot4D)
    remask     threshold of the probability of known tokens, at s = 0; 0: none
    drop       the most by which their probability may fall; 1: no limit

    The last three need a process that has an opinion on known tokens: mask < 1, or carry_over=False.
    Raises ValueError for a negative scale, and a threshold or drop outside [0, 1].
    """

    gumbel: float | int = 4.5
    compound: bool = False
    of_all: bool = False
    masks: bool = False
    revise: bool = False
    remask: float | int = 0.0
    drop: float | int = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.gumbel < 0:
            raise ValueError(f"Confidence: gumbel is {self.gumbel}; give 0 or more.")
        if not 0 <= self.remask <= 1 or not 0 <= self.drop <= 1:
            raise ValueError(f"Confidence: remask={self.remask} and drop={self.drop} must lie in [0, 1].")

    @property
    def takes_back(self) -> bool:
        """Whether known tokens may become unknown."""
        return self.revise or self.remask > 0 or self.drop < 1

    def init(self, process: Categorical, xt: Int[Array, "B N ..."]) -> PyTree:
        """(known tokens [B, N], bool; n_0 of each row [B, 1], 0 before the first step; scale of the noise [B, 1];
        probability of each token when it became known [B, N])

        Raises ValueError for options that this process makes useless.
        """
        if self.takes_back and process.carry_over and process.mask == 1:
            raise ValueError(
                "Confidence: revise, remask and drop need what the network says of known tokens, but the process"
                " carries them over: give it carry_over=False, or mask below 1."
            )
        if self.masks and process.ids == process.field.vocab:
            raise ValueError("Confidence: masks=True puts masks back, but the process has no mask id: leave it out.")
        rows, tokens = xt.shape[:2]
        none = jnp.zeros((rows, 1), jnp.int32)
        scale = jnp.full((rows, 1), self.gumbel, jnp.float32)
        return jnp.zeros((rows, tokens), bool), none, scale, jnp.zeros((rows, tokens), jnp.float32)

    def step(
        self,
        process: Categorical,
        key: Array,
        estimate: Float[Array, "*B V"],
        xt: Int[Array, "*B"],
        t: Array,
        s: Array,
        state: PyTree,
        again: Callable[[Array, Array], Array],
    ) -> tuple[Int[Array, "*B"], PyTree]:
        """x_s and the new state. Tokens with t = 0 are known. A row's s is the largest of its tokens."""
        draw_key, choice_key, replace_key = jax.random.split(key, 3)
        known, places, scale, since = state
        t, s = (jnp.broadcast_to(expand(time, known), known.shape) for time in (t, s))
        given = t == 0
        fixed = given if self.revise else known | given | _every_number(process.known(xt, t))
        unknown = jnp.sum(~fixed, axis=1, keepdims=True)
        total = jnp.full_like(unknown, known.shape[1]) if self.of_all else unknown
        places = jnp.where(places > 0, places, total)
        level = s.max(axis=1, keepdims=True)
        scale = scale * level if self.compound else self.gumbel * level
        share = self._share(process, level, places)
        count = jnp.where(level > 0, jnp.maximum(1, jnp.minimum(unknown - 1, share)), 0)
        gumbel = jax.random.gumbel(draw_key, estimate.shape)
        choice = scale * jax.random.gumbel(choice_key, known.shape)
        drawn, chosen = choose(estimate, xt, fixed, count, gumbel, choice)
        if self.remask > 0 or self.drop < 1:
            now = _probability(estimate, drawn)
            back = (now < self.remask * (1 - level)) | (since - now > self.drop)
            chosen = chosen | (back & fixed & known & ~given & (level > 0))
            since = jnp.where(fixed & ~chosen, since, now)
        if self.masks:
            replaced = process.noise(replace_key, known.shape)["mask"].astype(xt.dtype)
        else:
            replaced = process.sample_replaced(replace_key, known.shape, level)
        return jnp.where(_as_numbers(chosen, xt), replaced, drawn), (~chosen, places, scale, since)

    def _share(self, process: Categorical, level: Float[Array, "B 1"], places: Int[Array, "B 1"]) -> Int[Array, "B 1"]:
        """The number of unknown tokens at s."""
        kept, masked, _ = (each.mean(axis=1, keepdims=True) for each in process.masses(level))
        return (jnp.ceil(places * masked) if self.masks else jnp.floor(places * (1 - kept))).astype(jnp.int32)


def choose(
    logs: Float[Array, "*B V"],
    xt: Int[Array, "*B"],
    known: Bool[Array, "B N"],
    count: Int[Array, "B 1"],
    gumbel: Float[Array, "*B V"],
    choice: Float[Array, "B N"],
) -> tuple[Int[Array, "*B"], Bool[Array, "B N"]]:
    """A draw for each unknown token, and the `count` tokens with the lowest confidence, bool, to be replaced again.
    `gumbel` is the noise of the draw, `choice` that of the confidence."""
    drawn = jnp.where(_as_numbers(known, xt), xt, jnp.argmax(logs + gumbel, axis=-1).astype(xt.dtype))
    sure = jnp.take_along_axis(logs, drawn[..., None], axis=-1)[..., 0]
    sure = sure.reshape(*known.shape, -1).sum(axis=-1) + choice
    sure = jnp.where(known, jnp.inf, sure)
    return drawn, sure < jnp.take_along_axis(jnp.sort(sure, axis=1), count, axis=1)


def _probability(logs: Float[Array, "*B V"], ids: Int[Array, "*B"]) -> Float[Array, "B N"]:
    """exp of the sum of the log-probabilities of a token's ids."""
    each = jnp.take_along_axis(logs, jnp.minimum(ids, logs.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return jnp.exp(each.reshape(*each.shape[:2], -1).sum(axis=-1))


def _every_number(known: Bool[Array, "B N *P"]) -> Bool[Array, "B N"]:
    return known.reshape(*known.shape[:2], -1).all(axis=-1)


def _as_numbers(flag: Bool[Array, "B N"], xt: Int[Array, "B N *P"]) -> Bool[Array, "..."]:
    return flag.reshape(flag.shape + (1,) * (xt.ndim - 2))
