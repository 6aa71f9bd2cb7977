"""Confidence-based step sampler for the categorical process (for ancestral sampling see `ancestral.py`).

In every step from t to s:
1. each unknown token is drawn from p(x_0 | x_t);
2. n = floor((1 - abar(s)) n_0) of them, at least one and not all, are masked (or replaced) again; n_0 is the number of
   unknown tokens at the start;
3. these are the n with the lowest confidence log p(drawn) + gumbel s g, with Gumbel noise g; the others are known from
   now on. At s = 0 all are known.

Sources: Chang et al. 2022 "MaskGIT" (its code has choice_temperature 4.5 for `gumbel`); Xie et al. 2024 "Show-o".
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
from src.sampling.steps.base import StepBase


@dataclasses.dataclass(frozen=True, kw_only=True)
class Confidence(StepBase):
    """Keeps the most confident tokens first. The log-probabilities of a token's ids are summed.

    gumbel     scale of the noise at t = 1, annealed to 0; without noise, samples do not follow the model's distribution
    compound   multiply the scale by s in every step, instead of gumbel · s (the published Show-o)
    of_all     n_0 is the number of all tokens (the published Show-o)

    Raises ValueError for a negative scale.
    """

    gumbel: float | int = 4.5
    compound: bool = False
    of_all: bool = False

    def __post_init__(self):
        if self.gumbel < 0:
            raise ValueError(f"Confidence: gumbel is {self.gumbel}; give 0 or more.")

    def init(self, process: Categorical, xt: Int[Array, "B N ..."]) -> PyTree:
        """(known tokens [B, N], bool; n_0 of each row [B, 1], 0 before the first step; scale of the noise [B, 1])"""
        rows, tokens = xt.shape[:2]
        none = jnp.zeros((rows, 1), jnp.int32)
        return jnp.zeros((rows, tokens), bool), none, jnp.full((rows, 1), self.gumbel, jnp.float32)

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
        known, places, scale = state
        t, s = (jnp.broadcast_to(expand(time, known), known.shape) for time in (t, s))
        known = known | (t == 0) | _every_number(process.known(xt, t))
        unknown = jnp.sum(~known, axis=1, keepdims=True)
        total = jnp.full_like(unknown, known.shape[1]) if self.of_all else unknown
        places = jnp.where(places > 0, places, total)
        level = s.max(axis=1, keepdims=True)
        scale = scale * level if self.compound else self.gumbel * level
        share = jnp.floor(places * (1 - _mean_keep(process, level))).astype(jnp.int32)
        count = jnp.where(level > 0, jnp.maximum(1, jnp.minimum(unknown - 1, share)), 0)
        gumbel = jax.random.gumbel(draw_key, estimate.shape)
        choice = scale * jax.random.gumbel(choice_key, known.shape)
        drawn, chosen = choose(estimate, xt, known, count, gumbel, choice)
        replaced = process.sample_replaced(replace_key, known.shape, level)
        return jnp.where(_as_numbers(chosen, xt), replaced, drawn), (known | ~chosen, places, scale)


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


def _mean_keep(process: Categorical, level: Float[Array, "B 1"]) -> Float[Array, "B 1"]:
    """The mean of abar over the tokens of a row."""
    return process.masses(level)[0].mean(axis=1, keepdims=True)


def _every_number(known: Bool[Array, "B N *P"]) -> Bool[Array, "B N"]:
    return known.reshape(*known.shape[:2], -1).all(axis=-1)


def _as_numbers(flag: Bool[Array, "B N"], xt: Int[Array, "B N *P"]) -> Bool[Array, "..."]:
    return flag.reshape(flag.shape + (1,) * (xt.ndim - 2))
