"""A Gaussian process that remembers the losses it was told of, and shifts its times by them."""

import dataclasses

import jax.numpy as jnp

from src.corruption.gaussian import Gaussian
from src.objectives.diffusion import BINS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Remembering(Gaussian):
    """State: sums and counts of losses by time; `bound` is the state that the network's copy has."""

    bound: object = None

    def state(self):
        return {"total": jnp.zeros(BINS), "count": jnp.zeros(BINS)}

    def bind(self, state):
        return dataclasses.replace(self, bound=state)

    def update(self, state, term, step):
        return {"total": state["total"] + term.total.sum(1), "count": state["count"] + term.count.sum(1)}
