"""What every evaluator shares: its answer, and the checks of its options.

An evaluator is built as `Name(tasks, **options)` and called as `evaluator(pipeline, seed) -> Result`. `pipeline` is a
`sampling.pipeline.Pipeline` with parameters. It may have `check(fields)`, which looks at the files that it will read,
before anything compiles.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class Result:
    """What one evaluation found, by name: numbers, pictures (uint8 `[H, W, 3]`) and texts (Markdown).

    how   what the numbers depend on beside the run, as JSON has it; it is kept beside them in `metrics.json`
    """

    scalars: dict[str, float]
    images: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    texts: dict[str, str] = dataclasses.field(default_factory=dict)
    how: dict[str, Any] = dataclasses.field(default_factory=dict)


def check_counts(evaluator: str, **counts: int) -> None:
    """Raises ValueError if an option that counts things is no whole number, or negative."""
    for option, count in counts.items():
        if not isinstance(count, int) or count < 0:
            raise ValueError(f"evaluator {evaluator} has {option}={count!r}: give a whole number, 0 for none")


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
