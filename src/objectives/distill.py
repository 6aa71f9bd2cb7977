"""Distillation to the language model that the run began with: text is not forgotten while images are learned."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Batch, Hidden, LossTerm, Net, PyTree, View


class Distill:
    """τ² KL(teacher || student) of the next token, summed over the tokens that the data mark with `loss` (Hinton et al.
    2015; towards one's own beginning, Li & Hoiem 2016, Learning without Forgetting, arXiv 1606.09282).

    The teacher is the network with the parameters at the start of the run, after `init_from`. It reads the row as the
    language model that it was could: its text segments one behind the other, without images and their times, whose
    embedders it never learned. In rows of text alone both read the same. A token is left out when one of the two has
    nothing before it.

    fields        the text segments it covers
    temperature   τ: above 1 the unlikely tokens count more
    """

    taught = True  # the run keeps a teacher (`train/state.py`)

    def __init__(self, fields: tuple[str, ...], temperature: float = 1.0):
        if not temperature > 0:
            raise ValueError(f"the objective distill has temperature={temperature}; it must be above 0")
        self.fields, self.temperature = tuple(fields), temperature

    def prepare(self, view: View, batch: Batch, key: Array, train: bool) -> tuple[View, PyTree]:
        """Both read text as it is; kept beside the view is the text alone, for the teacher."""
        words = {name: ids for name, ids in view.inputs.items() if jnp.issubdtype(ids.dtype, jnp.integer)}
        valid = {name: flags for name, flags in view.valid.items() if name in words}
        places = view.places
        if places is not None:  # packed rows tell of all their slots at once, those of images among them
            valid, places = {name: batch[name].valid for name in words}, places.replace(begins={})
        return view, View(words, valid, {}, places=places)

    def loss(self, net: Net, hidden: Hidden, batch: Batch, aux: View) -> dict[str, LossTerm]:
        """`kl` in nats, and the number of tokens compared."""
        teacher = net.teacher()
        read = teacher.hidden({"": (hidden.layout.words(), aux)})[""]
        total = LossTerm(jnp.zeros(()), jnp.zeros(()))
        for name in self.fields:
            field = batch[name]
            (state, exists), (taught, there) = hidden.before(name), read.before(name)
            apart = net.text_divergence(state, teacher, taught, self.temperature)
            counted = field.loss & field.valid & exists & there
            counted = counted.astype(jnp.float32)
            total = total + LossTerm((apart * counted).sum(), counted.sum())
        return {"kl": total}
