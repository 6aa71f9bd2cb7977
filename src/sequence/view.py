"""From a batch to what the network is shown: the clean view of a task's rows."""

from __future__ import annotations

from collections.abc import Callable

from jaxtyping import Array

from src.interfaces import Batch, LabelField, TokenField, View
from src.sequence.layout import Layout


def clean_view(layout: Layout, batch: Batch, encode: Callable[[Array], Array]) -> View:
    """Text as ids, images as clean patches (`encode` is the device codec's), labels aside.

    Objectives replace what they corrupt. Raises KeyError when the batch lacks a field of the layout.
    """
    missing = [s.name for s in layout.segments if s.kind != "time" and s.name not in batch]
    if missing:
        raise KeyError(f"the batch has fields {sorted(batch)}, the layout also needs {missing}")
    inputs, valid, labels = {}, {}, None
    for name, field in batch.items():
        if isinstance(field, LabelField):
            labels = field.ids
        elif isinstance(field, TokenField):
            inputs[name], valid[name] = field.ids, field.valid
        else:
            inputs[name] = encode(field.values)
    return View(inputs, valid, {}, labels)
