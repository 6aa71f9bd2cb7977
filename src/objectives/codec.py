"""The losses of a learned codec, beside those of what reads and makes its tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Field, Hidden, LossTerm, Net, PyTree, View


class CodecLoss:
    """Trains the learned codec (`fields.<name>.learned`) of some names on the values of a task's rows.

    All valid tokens count, given ones, too. Its terms have the names of the codec's losses.
    """

    trains_codec = True  # of its names

    def __init__(self, names: Sequence[str] | str):
        self.names = (names,) if isinstance(names, str) else tuple(names)

    def draw(self, key: Array, fields: Mapping[str, Field], view: View) -> PyTree:
        """Nothing is random."""
        return ()

    def prepare(self, net: Net, view: View, draws: PyTree) -> tuple[View, PyTree]:
        """The view, unchanged."""
        return view, draws

    def loss(self, net: Net, hidden: Hidden, aux: PyTree) -> dict[str, LossTerm]:
        """The codec's losses, summed over the tokens, and their number."""
        terms: dict[str, LossTerm] = {}
        for name in self.names:
            tokens = hidden.view.batch.tokens[name]
            value = tokens.value.reshape(-1, *tokens.value.shape[-2:])
            there = tokens.valid.reshape(value.shape[:-1])
            for label, each in net.field(name).codec_losses(value).items():
                term = LossTerm(jnp.where(there, each, 0).sum(), there.sum(dtype=jnp.float32))
                terms[label] = terms[label] + term if label in terms else term
        return terms
