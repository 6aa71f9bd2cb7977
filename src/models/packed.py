"""How packed rows become vectors: every part is embedded where it is given, and gathered into its slot."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from src.interfaces import SequenceSpec, View
from src.models.conditioning import Condition
from src.sequence.packed import Document


def embed_document(
    model: Any, layout: Document, view: View
) -> tuple[Float[Array, "B S D"], SequenceSpec, Condition, dict[str, Array]]:
    """Vectors, visibility and condition of packed rows, and the condition `[B, M, D]` of the images by name.

    `model` is the `Model` whose parts embed.
    """
    places, valid = view.places, view.valid[layout.text]
    texts = model.text(view.inputs[layout.text])
    rows, slots, width = texts.shape
    source = jnp.broadcast_to(jnp.arange(slots), (rows, slots))  # where the vector of each slot is among all parts
    parts, vectors, total = [texts], {}, slots
    owner, images = jnp.full((rows, slots), -1, jnp.int32), 0

    def add(vectors: Array, image: Array, token: Array) -> None:
        nonlocal source, total
        parts.append(vectors.reshape(rows, -1, width))
        source = jnp.where(image >= 0, total + token, source)
        total += parts[-1].shape[1]

    for name in layout.named("image"):
        patches = view.inputs[name]
        count = patches.shape[1]
        vector = vectors[name] = model.time(view.times.get(name, jnp.zeros((rows, count), jnp.float32)))
        grid = (view.grids or {}).get(name)
        x = model.image(_fold(patches), None if grid is None else grid.reshape(-1, 2))
        image, token = layout.owner(places, name)
        add(model.conditioning.before(x, vector.reshape(-1, 1, width)), image, token)
        owner, images = jnp.where(image >= 0, images + image, owner), images + count
        if layout.time:
            add(model.conditioning.token(vector), *layout.owner(places, name, "time"))
    for name in layout.named("vision"):
        pictures = view.inputs[name]
        add(model.vision(_fold(pictures)), *layout.owner(places, name))
        if layout.time:
            clean = model.time(jnp.zeros((rows, pictures.shape[1]), jnp.float32))
            add(model.conditioning.token(clean), *layout.owner(places, name, "time"))
    x = jnp.take_along_axis(jnp.concatenate(parts, axis=1), source[..., None], axis=1)
    none = jnp.zeros_like(x[:, :1])
    condition = Condition(jnp.concatenate([*vectors.values()], axis=1) if vectors else none, owner)
    return x, layout.spec_of(valid, places), condition, vectors


def _fold(a: Float[Array, "B M N P"]) -> Float[Array, "images N P"]:
    return a.reshape(-1, *a.shape[2:])
