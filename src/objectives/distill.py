"""Distillation from the initial network, against forgetting while other fields are learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Field, Hidden, LossTerm, Net, PyTree, View, row_of


class Distill:
    """τ² KL(teacher || student) of the next token, summed over the targets of `names` (Hinton et al. 2015; with the
    initial network as teacher, Li & Hoiem 2016, Learning without Forgetting, arXiv 1606.09282).

    The teacher is the network with the initial parameters, after `init_from`. It reads only the segments of the fields
    of `names`, concatenated, since the embedders of other fields are new. A token that teacher or student cannot
    predict, because no token precedes it, is left out.

    temperature   τ: above 1, unlikely tokens have more weight
    """

    predicts_next = True  # reads the state before each token
    taught = True  # the run keeps a teacher (`train/teacher.py`)

    def __init__(self, names: Sequence[str] | str, temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"the objective distill has temperature={temperature}; it must be above 0")
        self.names, self.temperature = (names,) if isinstance(names, str) else tuple(names), temperature

    def draw(self, key: Array, fields: Mapping[str, Field], view: View) -> PyTree:
        """No random numbers."""
        return ()

    def prepare(self, net: Net, view: View, draws: PyTree) -> tuple[View, View]:
        """The view, unchanged, and the teacher's view."""
        rows = {row_of(name) for name in self.names}
        layout = view.layout.only(lambda segment: row_of(segment.name) in rows)
        tokens = {name: value for name, value in view.batch.tokens.items() if row_of(name) in rows}
        return view, View(view.batch.replace(tokens=tokens, cond={}), layout)

    def loss(self, net: Net, hidden: Hidden, aux: View) -> dict[str, LossTerm]:
        """`kl` in nats, and its number of tokens."""
        teacher = net.teacher()
        read = teacher.hidden({"": aux})[""]
        total = LossTerm(jnp.zeros(()), jnp.zeros(()))
        for name in self.names:
            tokens = hidden.view.batch.tokens[name]
            (state, exists), (taught, there) = hidden.before(name), read.before(name)
            apart = net.field(name).divergence(state, teacher.field(name), taught, self.temperature)
            counted = (tokens.target & tokens.valid & exists & there).astype(jnp.float32)
            total = total + LossTerm((apart * counted).sum(), counted.sum())
        return {"kl": total}
