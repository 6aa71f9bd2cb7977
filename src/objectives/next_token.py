"""Next-token prediction of ids or vectors, by the loss of the field's head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from src.common.rng import stream
from src.interfaces import Field, Hidden, LossTerm, Net, PyTree, View, row_of


class NextToken:
    """-log p(token | all tokens before it), or the head's own loss, summed over the targets of `names`.

    A token is predicted from the last valid state before it in the sequence, of any segment; a token without one is
    left out.
    """

    predicts_next = True  # reads the state before each token

    def __init__(self, names: Sequence[str] | str):
        self.names = (names,) if isinstance(names, str) else tuple(names)

    def draw(self, key: Array, fields: Mapping[str, Field], view: View) -> PyTree:
        """The random numbers of the heads' losses."""
        shapes = {name: view.batch.tokens[name].valid.shape for name in self.names}
        return {name: fields[row_of(name)].noise(stream(key, name), shape) for name, shape in shapes.items()}

    def prepare(self, net: Net, view: View, draws: PyTree) -> tuple[View, PyTree]:
        """The view, unchanged."""
        return view, draws

    def loss(self, net: Net, hidden: Hidden, aux: PyTree) -> dict[str, LossTerm]:
        """`nll` in nats, and its number of tokens."""
        total = LossTerm(jnp.zeros(()), jnp.zeros(()))
        for name in self.names:
            bound, tokens = net.field(name), hidden.view.batch.tokens[name]
            state, exists = hidden.before(name)
            if bound.past and tokens.valid.shape[1] != bound.field.spec.tokens:
                raise ValueError(
                    f"the head of {name} reads the tokens before the one that it makes, and the"
                    f" {tokens.valid.shape[1]} tokens in a row are of several examples: take the head token_diffusion,"
                    " or rows of one example each"
                )
            nll = bound.nll(state, bound.encode(tokens.value), aux[name])
            counted = (tokens.target & tokens.valid & exists).astype(jnp.float32)
            total = total + LossTerm((nll * counted).sum(), counted.sum())
        return {"nll": total}
