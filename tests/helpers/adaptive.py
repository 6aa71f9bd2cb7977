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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Large(Remembering):
    """With a whole number, and a table that is larger than what `fsdp` leaves whole; `network` reads all of it."""

    def state(self):
        return super().state() | {
            "updates": jnp.zeros((), jnp.int32),
            "table": jnp.linspace(0.5, 1.5, 2**17).reshape(2, -1),
        }

    def network(self, xt, t):
        value, time = super().network(xt, t)
        return value if self.bound is None else value * self.bound["table"].mean(), time

    def update(self, state, term, step):
        updates = state["updates"] + 1
        return super().update(state, term, step) | {"updates": updates, "table": state["table"]}
