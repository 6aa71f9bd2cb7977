"""Next-token cross-entropy."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Batch, Hidden, LossTerm, Net, PyTree, View


class NextToken:
    """-log p(token | everything before it), summed over the tokens that the data mark with `loss`.

    A token is predicted from the state just before it in the sequence, which may be the last patch of an image;
    it is left out when that place is padding. `fields`: the text segments it covers.
    """

    def __init__(self, fields: tuple[str, ...]):
        self.fields = tuple(fields)

    def prepare(self, view: View, batch: Batch, key: Array, train: bool) -> tuple[View, PyTree]:
        """Text is read as it is."""
        return view, None

    def loss(self, net: Net, hidden: Hidden, batch: Batch, aux: PyTree) -> dict[str, LossTerm]:
        """`nats`, and the number of tokens predicted."""
        total = LossTerm(jnp.zeros(()), jnp.zeros(()))
        for name in self.fields:
            field = batch[name]
            state, exists = hidden.before(name)
            nats = net.text_nats(state, field.ids)
            counted = (field.loss & field.valid & exists).astype(jnp.float32)
            total = total + LossTerm((nats * counted).sum(), counted.sum())
        return {"nats": total}
