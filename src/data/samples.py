"""What codecs learn from: the texts and the values of the training data of all tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from src.codecs.pixels import scaled
from src.data.example import BadRow
from src.data.images import fitted
from src.data.splits import numbers_of, rows_of

MOST = 4096  # examples of a task that a codec learns from


def samples_for(row: str, sources: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """The function (what, first link) -> what a link of the field `row` may learn from.

    `texts`: all that the sources bring for tokenizers, each once. `values`: of the first examples of each source that
    have a value of the field's name, what the first link of the codec makes of it, [n, …].
    Raises ValueError when no source brings any.
    """

    def samples(what: str, link: Any) -> Any:
        found = texts(sources) if what == "texts" else values(row, sources, link)
        if not len(found):
            advice = "set its path" if what == "texts" else "give examples that have one"
            raise ValueError(f"fields.{row}.codec learns from {what}, and no task's source brings any: {advice}")
        return found

    return samples


def texts(sources: Mapping[str, Any]) -> tuple[str, ...]:
    """All training text, in order."""
    found: dict[str, None] = {}
    for source in sources.values():
        found |= dict.fromkeys(source.texts() if hasattr(source, "texts") else ())
    return tuple(found)


def values(row: str, sources: Mapping[str, Any], link: Any) -> np.ndarray:
    """Values of training examples."""
    found = []
    for source in sources.values():
        for number in numbers_of(source, "train", np.arange(min(rows_of(source, "train"), MOST))):
            try:
                example = source[int(number)]
            except BadRow:
                continue
            if example.get(row) is None:
                break
            value = example[row]
            if getattr(source, "holds", "pixels") == "pixels":
                value = scaled(fitted(value, f"row {number}", link.shape[2], link.encode))
            found.append(np.asarray(value, np.float32))
    return np.stack(found) if found else np.zeros((0,))
