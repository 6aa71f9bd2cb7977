"""Step samplers of the categorical process that jump at rates: ReMDM, discrete flow matching, tau-leaping.

With a = abar(t), a' = abar(s) > a of a step t -> s, and p = p(x_0 | x_t):

1. ReMDM, for masks only: a known token is masked again with probability u; a mask becomes a draw of p with probability
   (a' - (1 - u) a) / (1 - a). Every 0 <= u <= min(1, (1 - a') / a) keeps the marginals q(x_s | x_0).
2. Discrete flow matching: with probability (1 + c) (a' - a) / (1 - a) a token becomes a draw of p; else, with
   probability c (a' - a) / a' times the probability that it is data and not noise, a draw of the noise. c > 0 adds
   equal and opposite rates (the corrector), which repair earlier errors.
3. Tau-leaping: the rate to an id j, times the length of the step, is the joint probability of x_s = j and x_t that is
   normalised in Bayes' rule; a token leaves with probability 1 - exp(-sum of them). Where ids are ordered, the numbers
   of jumps are Poisson and their distances add up.

The last step of 3 is the posterior itself, so that no noise is left; 1 and 2 end clean by themselves.

Sources: Wang et al. 2025 "ReMDM" (1), Gat et al. 2024 and Campbell et al. 2024 (2), Campbell et al. 2022 (3).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from src.corruption.base import expand
from src.corruption.categorical import TINY, Categorical
from src.interfaces import PyTree
from src.sampling.steps.base import TimelineBase

RULES = ("cap", "rescale")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReMDM(TimelineBase):
    """Masks known tokens again, as 1 in the docstring of the module.

    rule    cap: u = min(eta, most); rescale: u = eta · most, with the largest u that keeps the marginals
    eta     0 is ancestral sampling

    Raises ValueError for an unknown rule, eta outside [0, 1], and a process with other noise than masks.
    """

    rule: str = "cap"
    eta: float | int = 0.02

    def __post_init__(self):
        super().__post_init__()
        if self.rule not in RULES or not 0 <= self.eta <= 1:
            raise ValueError(f"ReMDM: rule={self.rule!r} must be one of {RULES}, and eta={self.eta} lie in [0, 1].")

    def init(self, process: Categorical, xt: Int[Array, "*B"]) -> PyTree:
        """No state. Raises ValueError for a process with other noise than masks."""
        if process.mask != 1 or type(process).masses is not Categorical.masses:
            raise ValueError("ReMDM needs a process with masks only: give it mask=1, or take another step sampler.")
        return ()

    def remasked(self, keep_t: Float[Array, "..."], keep_s: Float[Array, "..."]) -> Float[Array, "..."]:
        """u of a step."""
        most = jnp.minimum(1.0, (1 - keep_s) / jnp.maximum(keep_t, TINY))
        return jnp.minimum(self.eta, most) if self.rule == "cap" else self.eta * most

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
        """x_s. Tokens with t = 0 stay."""
        draw_key, jump_key, mask_key = jax.random.split(key, 3)
        t, s = expand(t, xt), expand(s, xt)
        keep_t, keep_s = process.schedule.keep(t), process.schedule.keep(s)
        again_masked = self.remasked(keep_t, keep_s)
        shown = (keep_s - (1 - again_masked) * keep_t) / jnp.maximum(1 - keep_t, TINY)
        uniform, masks = jax.random.uniform(jump_key, xt.shape), process.sample_replaced(mask_key, xt.shape[:2], s)
        masked = xt >= process.field.vocab
        ids = jnp.where(masked & (uniform < shown), _draw(draw_key, estimate, xt), xt)
        return jnp.where(~masked & (uniform < again_masked) & (t > 0), masks, ids), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class FlowMatching(TimelineBase):
    """Discrete flow matching, as 2 in the docstring of the module.

    corrector   c; 0: none

    Raises ValueError for a negative corrector, and a process whose noise changes its law with t, or is by distance.
    """

    corrector: float | int = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.corrector < 0:
            raise ValueError(f"FlowMatching: corrector is {self.corrector}; give 0 or more.")

    def init(self, process: Categorical, xt: Int[Array, "*B"]) -> PyTree:
        """No state. Raises ValueError for a process whose noise is not drawn from one law."""
        moves = type(process).masses is not Categorical.masses or type(process).likelihood is not Categorical.likelihood
        if moves:
            name = type(process).__name__
            raise ValueError(f"FlowMatching needs noise of one law at all times, which {name} has not: take ancestral.")
        return ()

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
        """x_s. Tokens with t = 0 stay."""
        draw_key, forward_key, back_key, noise_key = jax.random.split(key, 4)
        t, s = expand(t, xt), expand(s, xt)
        keep_t, mask, rest = process.masses(t)
        keep_s = process.schedule.keep(s)
        forward = (1 + self.corrector) * (keep_s - keep_t) / jnp.maximum(1 - keep_t, TINY)
        backward = jnp.where(s > 0, self.corrector * (keep_s - keep_t) / jnp.maximum(keep_s, TINY), 0.0)
        same = jnp.take_along_axis(estimate, jnp.minimum(xt, process.field.vocab - 1)[..., None], axis=-1)[..., 0]
        data = keep_t / jnp.maximum(keep_t + process.mass_at(xt, mask, rest), TINY)
        data = jnp.where(xt < process.field.vocab, jnp.exp(same) * data, 0.0)
        ahead = (jax.random.uniform(forward_key, xt.shape) < forward) & (t > 0)
        back = jax.random.uniform(back_key, xt.shape) < backward * data
        noise = process.sample_replaced(noise_key, xt.shape[:2], s)
        return jnp.where(ahead, _draw(draw_key, estimate, xt), jnp.where(back, noise, xt)), state


@dataclasses.dataclass(frozen=True, kw_only=True)
class TauLeaping(TimelineBase):
    """As 3 in the docstring of the module, for every kernel.

    ordered   ids are numbers: several jumps of one token add up, within the vocabulary (for `distance.Distance`)
    """

    ordered: bool = False

    def init(self, process: Categorical, xt: Int[Array, "*B"]) -> PyTree:
        """No state. Raises ValueError for ordered ids of a process with mask ids."""
        if self.ordered and process.ids > process.field.vocab:
            raise ValueError("TauLeaping: mask ids have no place in an order; give ordered=False.")
        return ()

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
        """x_s. Tokens with t = s stay."""
        last_key, leave_key, jump_key = jax.random.split(key, 3)
        exact = process.posterior(last_key, xt, estimate, t, s)
        t, s = expand(t, xt), expand(s, xt)
        q = process.likelihood(xt, t)
        r = jnp.where(q > 0, jnp.exp(estimate) / jnp.maximum(q, TINY), 0.0)
        every = jnp.arange(process.ids)
        rates = jnp.where(every == xt[..., None], 0.0, process.spread(r, s) * process.arrival(xt, t, s))
        rates = jnp.where((t > s)[..., None], rates, 0.0)
        if self.ordered:
            jumps = jax.random.poisson(jump_key, rates)
            leapt = jnp.clip(xt + (jumps * (every - xt[..., None])).sum(axis=-1), 0, process.ids - 1).astype(xt.dtype)
        else:
            leaves = jax.random.uniform(leave_key, xt.shape) < -jnp.expm1(-rates.sum(axis=-1))
            logs = jnp.where(rates > 0, jnp.log(jnp.maximum(rates, TINY)), -jnp.inf)
            leapt = jnp.where(leaves, jax.random.categorical(jump_key, logs, axis=-1).astype(xt.dtype), xt)
        return jnp.where(s > 0, leapt, exact), state


def _draw(key: Array, estimate: Float[Array, "*B V"], xt: Int[Array, "*B"]) -> Int[Array, "*B"]:
    return jax.random.categorical(key, estimate, axis=-1).astype(xt.dtype)
