"""Parallel unmasking that stops early: in every step all tokens that the network is sure of, so a block needs as many
steps as its text is hard.

In every step each unknown token is drawn from p(x_0 | x_t), and kept where
1. the largest probability of the token is at least `confidence`; or
2. it is among the tokens of least entropy whose entropies add up to at most `entropy`, the largest one not counted.
   That sum bounds the mutual information (total correlation) of the tokens, which a draw in parallel loses; or
3. its largest probability is the largest one of the row: at least one token is kept in every step.

Which tokens are kept depends on the probabilities and not on the draws. With entropy=0 and confidence above 1 they are
kept one at a time, and the samples have the law of the network, in the order that it chooses.

Sources: Wu et al. 2025 "Fast-dLLM" (1, with the likeliest token); Ben-Hamu et al. 2025 "EB-Sampler" (2).
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
class Threshold(StepBase):
    """Keeps what is sure. The step to t = 0 keeps all tokens.

    confidence    probability from which a token is kept; above 1: the rule is off
    entropy       nats that tokens of one step may add up to, without the largest; 0: the rule is off
    temperature   of the draws; 0: the likeliest token

    Raises ValueError for negative numbers.
    """

    confidence: float | int = 0.9
    entropy: float | int = 0.0
    temperature: float | int = 1.0

    def __post_init__(self):
        if min(self.confidence, self.entropy, self.temperature) < 0:
            raise ValueError(
                f"Threshold: confidence={self.confidence}, entropy={self.entropy}, temperature={self.temperature}; give"
                " 0 or more of each."
            )

    def init(self, process: Categorical, xt: Int[Array, "B N"]) -> Bool[Array, "B N"]:
        """Which tokens are known: those that are no mask. Raises ValueError for a process with other noise than masks,
        and for tokens of several ids."""
        if process.mask != 1 or process.field.features is not None:
            raise ValueError(
                "the step sampler threshold keeps every token that is no mask: give the process mask=1 and one id a"
                " token, or the field another step"
            )
        return xt < process.field.vocab

    def finished(self, process: Categorical, xt: Int[Array, "B N"], state: Bool[Array, "B N"]) -> Bool[Array, " B"]:
        """Rows without unknown tokens."""
        return (xt < process.field.vocab).all(axis=1)

    def step(
        self,
        process: Categorical,
        key: Array,
        estimate: Float[Array, "B N V"],
        xt: Int[Array, "B N"],
        t: Array,
        s: Array,
        state: Bool[Array, "B N"],
        again: Callable[[PyTree, Array], PyTree],
    ) -> tuple[Int[Array, "B N"], Bool[Array, "B N"]]:
        """One step; times [], [B, 1] or [B, N]."""
        known = xt < process.field.vocab
        sure = sure_tokens(estimate, known, self.confidence, self.entropy)
        sure = sure | (jnp.broadcast_to(expand(s, xt), xt.shape).max(axis=1, keepdims=True) == 0)
        if self.temperature:
            drawn = jax.random.categorical(key, estimate / self.temperature, axis=-1)
        else:
            drawn = jnp.argmax(estimate, axis=-1)
        xs = jnp.where(~known & sure, drawn.astype(xt.dtype), xt)
        return xs, xs < process.field.vocab


def sure_tokens(
    logs: Float[Array, "B N V"], known: Bool[Array, "B N"], confidence: float, entropy: float
) -> Bool[Array, "B N"]:
    """The unknown tokens that rules 1 to 3 keep (docstring of the module), from log p(x_0 | x_t)."""
    best = jnp.where(known, -1.0, jnp.exp(logs.max(axis=-1)))
    first = jnp.arange(best.shape[1]) == jnp.argmax(best, axis=1)[:, None]
    sure = (best >= confidence) | first
    if entropy:
        each = jnp.where(known, jnp.inf, -(jnp.exp(logs) * logs).sum(axis=-1))
        order = jnp.argsort(each, axis=1)
        ranked = jnp.take_along_axis(each, order, axis=1)
        before = jnp.cumsum(jnp.where(jnp.isfinite(ranked), ranked, 0.0), axis=1) - ranked  # without the largest
        fits = jnp.take_along_axis(jnp.isfinite(ranked) & (before <= entropy), jnp.argsort(order, axis=1), axis=1)
        sure = sure | fits
    return sure & ~known
