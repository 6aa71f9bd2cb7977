"""From a batch to what the network is shown: the clean view of a task's rows."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Batch, BucketField, LabelField, TokenField, View
from src.sequence.layout import Layout, time_name
from src.sequence.packed import Document, document_view


def clean_view(layout: Layout, batch: Batch, encode: Callable[[Array], Array], generated: tuple[str, ...] = ()) -> View:
    """Text as ids, images as clean patches (`encode` is the device codec's), features as they are, labels aside.

    An image that does not count (`valid`) becomes zeros, whatever it held, and keeps its places: masks that are known
    before any data stay so. One of a vision segment becomes padding with its time token, which nobody sees. Objectives
    replace what they corrupt; samplers name what they will generate, and what follows it is not needed.
    Raises KeyError when the batch lacks a field of the layout.
    """
    if isinstance(layout, Document):
        return document_view(layout, batch, encode)
    names = [s.name for s in layout.segments if s.kind != "time"]
    needed = names[: max(names.index(n) for n in generated) + 1] if generated else names
    missing = [n for n in needed if n not in batch and n not in generated]
    if missing:
        raise KeyError(f"the batch has fields {sorted(batch)}, the layout also needs {missing}")
    kinds = {s.name: s.kind for s in layout.segments}
    inputs, valid, labels = {}, {}, None
    for name, field in batch.items():
        if isinstance(field, LabelField):
            labels = field.ids
        elif isinstance(field, TokenField):
            inputs[name], valid[name] = field.ids, field.valid
        elif name in kinds and kinds[name] == "vision":
            shown = jnp.ones(field.values.shape[:1], bool) if field.valid is None else field.valid
            inputs[name] = jnp.where(shown[:, None, None], field.values, 0)
            valid[name] = jnp.broadcast_to(shown[:, None], field.values.shape[:2])
            if time_name(name) in kinds:
                valid[time_name(name)] = shown[:, None]
        else:
            patches = encode(field.values)
            inputs[name] = patches if field.valid is None else jnp.where(field.valid[:, None, None], patches, 0)
    grids = {name: field.grid for name, field in batch.items() if isinstance(field, BucketField)}
    return View(inputs, valid, {}, labels, grids=grids or None)
