"""Selection of the checkpoints to keep, and their scores.

A checkpoint is removed only after a newer one is complete, and is renamed first, so that a killed run leaves too many
checkpoints but no partial one.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
from etils import epath

from src.common.files.store import is_remote, write_whole
from src.common.files.strict_json import read_json
from src.common.runtime.errors import brief

LEFTOVER = ".orbax-checkpoint-tmp"

Scores = Mapping[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Retention:
    """Keeps the newest `last` checkpoints, those at multiples of `every` steps (0: none), and the `best` by `metric`.

    `mode` is max or min; without a `metric` there are no best ones. Of equal scores the later is better. Raises
    ValueError for invalid numbers or modes.
    """

    last: int
    every: int = 0
    metric: str = ""
    mode: str = "max"
    best: int = 1

    def __post_init__(self):
        least = {"keep": (self.last, 1), "keep_every": (self.every, 0), "best.keep": (self.best, 1)}
        for name, (value, minimum) in least.items():
            if value < minimum:
                raise ValueError(f"checkpoint.{name} must be at least {minimum}, not {value}")
        if self.mode not in ("max", "min"):
            raise ValueError(f"checkpoint.best.mode={self.mode!r} is unknown; use max or min")

    def ranked(self, steps: Iterable[int], scores: Scores) -> list[int]:
        """The steps with a finite score, the best first."""
        known = {s: v for s in steps if (v := scores.get(s, {}).get(self.metric)) is not None and math.isfinite(v)}
        return sorted(known, key=lambda s: (known[s] if self.mode == "max" else -known[s], s), reverse=True)

    def chosen(self, steps: Iterable[int], scores: Scores) -> set[int]:
        """The steps to keep in addition to the newest: multiples of `every`, and the best."""
        steps = list(steps)
        milestones = {step for step in steps if self.every and step % self.every == 0}
        return milestones | set(self.ranked(steps, scores)[: self.best])

    def kept(self, steps: Iterable[int], scores: Scores) -> set[int]:
        """All steps to keep, always with the newest."""
        steps = sorted(steps)
        return set(steps[-self.last :]) | self.chosen(steps, scores)


def without_scores(metric: str, evaluators: Iterable[str], every: int) -> str:
    """What is to be told at the start of a run whose best checkpoints cannot be known, "" where they may be."""
    evaluators = list(evaluators)
    if not metric or (evaluators and every):
        return ""
    if not evaluators:
        return f"checkpoint.best.metric={metric} is never known, because eval.evaluators is empty: add one, or unset it"
    return (
        f"checkpoint.best.metric={metric} is known at the end of the run alone, because eval.every=0: set eval.every to"
        " the steps between two evaluations"
    )


def names(scalars: Mapping[str, Any]) -> str:
    """All names of an evaluation's scalars, for a message."""
    return ", ".join(sorted(scalars)) or "the scalars, because no evaluator gives one"


class ScoreFile:
    """`scores.json` of a run: the evaluators' scalars by step. A file that cannot be read counts as empty."""

    def __init__(self, workdir: epath.Path):
        self.path = workdir / "scores.json"

    def read(self) -> dict[int, dict[str, float]]:
        """Finite scores by step and name."""
        try:
            found = read_json(self.path)
            return {int(step): {k: float(v) for k, v in each.items()} for step, each in found.items()}
        except FileNotFoundError:
            return {}
        except Exception as error:
            logging.warning("%s cannot be read (%s); no checkpoint counts as best.", self.path, brief(error))
            return {}

    def write(self, step: int, scalars: Mapping[str, Any], steps: Iterable[int]) -> None:
        """Adds a step's scores and removes those of steps not in `steps`; a failure is only logged."""
        book = {s: each for s, each in self.read().items() if s in set(steps)}
        book[step] = {k: float(v) for k, v in scalars.items() if math.isfinite(v)}
        self._save(book)

    def forget(self, step: int) -> None:
        """Removes a step's scores, before another checkpoint of that step is written."""
        if self.path.exists() and step in (book := self.read()):
            del book[step]
            self._save(book)

    def _save(self, book: Mapping[int, Mapping[str, float]]) -> None:
        try:
            write_whole(self.path, (json.dumps({str(s): book[s] for s in sorted(book)}, indent=1) + "\n").encode())
        except Exception as error:
            logging.warning("%s was not written (%s); the best checkpoint may not be known.", self.path, brief(error))


def remove(folder: epath.Path) -> None:
    """Removes a checkpoint, on a local disk atomically. Raises the errors of the file system."""
    if not is_remote(folder):
        folder = folder.rename(folder.with_name(f"{folder.name}{LEFTOVER}-removed"))
    folder.rmtree()


def sweep(directory: epath.Path) -> None:
    """Removes the remains of failed or killed writes; call it only while nothing is being written."""
    for rest in directory.glob(f"*{LEFTOVER}*"):
        try:
            rest.rmtree()
        except Exception as error:  # clients of stores raise errors of their own classes
            logging.warning("Could not remove %s: %s", rest, brief(error))
