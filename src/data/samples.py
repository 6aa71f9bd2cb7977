"""What codecs learn from: the texts and the values of the training data of all tasks."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from src.codecs.pixels import scaled
from src.common.lookup import parameters
from src.data.example import BadRow
from src.data.images import fitted
from src.data.splits import example_of, numbers_of, rows_of

MOST = 4096  # examples of a task that a codec learns from


class Samples:
    """What a link of the field `row` may learn from: (what, first link) -> texts, or values [n, …].

    `texts`: all that the sources bring for tokenizers, each once. `values`: of up to MOST training examples of each
    source, evenly over its rows, what the first link of the codec makes of the value called as the field, or, for a
    link that takes images, `image`. `about`: text that changes with the options of the sources.
    Raises ValueError when no source brings any.
    """

    def __init__(self, row: str, sources: Mapping[str, Any]):
        self.row, self.sources = row, sources

    def __call__(self, what: str, link: Any) -> Any:
        found = texts(self.sources) if what == "texts" else values(self.row, self.sources, link)
        if not len(found):
            advice = "set its path" if what == "texts" else "give examples that have one"
            raise ValueError(f"fields.{self.row}.codec learns from {what}, and no task's source brings any: {advice}")
        return found

    @property
    def about(self) -> str:
        told = [self.row]
        for source in self.sources.values():
            options = {p.name: getattr(source, "__dict__", {}).get(p.name) for p in parameters(type(source))}
            told.append(f"{type(source).__qualname__} {options}")
        return "\n".join(told)


def samples_for(row: str, sources: Mapping[str, Any]) -> Samples:
    """The samples for a field."""
    return Samples(row, sources)


def texts(sources: Mapping[str, Any]) -> tuple[str, ...]:
    """All training text, in order."""
    found: dict[str, None] = {}
    for source in sources.values():
        found |= dict.fromkeys(source.texts() if hasattr(source, "texts") else ())
    return tuple(found)


def values(row: str, sources: Mapping[str, Any], link: Any) -> np.ndarray:
    """Values of training examples, evenly over the rows, which may be sorted by class."""
    found = []
    for source in sources.values():
        rows = rows_of(source, "train")
        most = min(rows, MOST)
        for number in numbers_of(source, "train", np.arange(most) * rows // most):
            with contextlib.suppress(BadRow):
                value = _value(row, example_of(source, int(number)), link)
                if value is None:
                    continue
                if getattr(source, "holds", "pixels") == "pixels":
                    value = scaled(fitted(value, f"row {number}", link.shape[2], link.encode))
                found.append(np.asarray(value, np.float32))
    return np.stack(found) if found else np.zeros((0,))


def _value(row: str, example: Mapping[str, Any], link: Any) -> Any:
    """The value of a field in an example; templates take that of every field of images from `image`."""
    return example.get("image") if row not in example and len(link.shape) == 3 else example.get(row)
