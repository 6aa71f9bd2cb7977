"""What every evaluator shares: its answer, and finding the tasks that it needs.

An evaluator is built as `Name(tasks, **options)` and called as `evaluator(predict, seed) -> Result`. `predict` has

    draw(task, words=[...] | labels=[...], seed=int) -> images [n, h, w, C] float, in [-1, 1] up to sampling error
    write(task, words=[...] | images=[n, h, w, C], seed=int) -> n texts, generated after the words or the image
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """What one evaluation found, by name: numbers, pictures (uint8 `[H, W, 3]`) and texts (Markdown)."""

    scalars: dict[str, float]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)


def find_task(tasks: Mapping[str, Any], evaluator: str, option: str, name: str, cls: type) -> Any:
    """The task that an evaluator's option names.

    Raises ValueError if there is no task of this name, or if it is no `cls`.
    """
    if name not in tasks:
        raise ValueError(
            f"evaluator {evaluator} has {option}={name!r}, but the config has no such task, only "
            f"{', '.join(tasks) or 'none'}: set {option} to the name of a {cls.__name__} task"
        )
    if not isinstance(tasks[name], cls):
        raise ValueError(
            f"evaluator {evaluator} has {option}={name!r}, which is a {type(tasks[name]).__name__} task: "
            f"set {option} to the name of a {cls.__name__} task"
        )
    return tasks[name]


def check_counts(evaluator: str, **counts: int) -> None:
    """Raises ValueError if an option that counts things is not a positive whole number."""
    for option, count in counts.items():
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"evaluator {evaluator} has {option}={count!r}: give a whole number of at least 1")


def spread(total: int, most: int) -> np.ndarray:
    """At most `most` of the indices 0 .. total-1, evenly spread."""
    count = min(total, most)
    return np.arange(count) * total // max(count, 1)


def same_words(said: str, meant: str) -> bool:
    """Whether two texts are equal but for white space."""
    return said.split() == meant.split()


def bullets(lines: list[str]) -> str:
    """A Markdown list."""
    return "\n".join(f"- {line}" for line in lines)
