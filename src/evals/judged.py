"""Made values that their source judges by construction, for each of several decoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from src.evals.frechet import frechet_distance
from src.evals.result import Result, check_counts
from src.interfaces import row_of


class JudgedEvaluator:
    """Evaluates what the task `task` makes for `rows` held-out questions, repeated where there are fewer.

    modes    decoders by name, in place of the config's (`sampling/decoders`); none: the config's
    prefix   stands before the names of the numbers, where several evaluators are of this kind

    Numbers are the means of those that the source's `judged(question, made)` gives, `<mode>/<name>`; images are judged
    as the source has them, texts as texts. Where the source has `features(question, made)`, which gives those of what
    was made and of something real that fits the question, `[n, d]` each, `frechet` is the Fréchet distance of all.

    Raises ValueError for a task that is missing, makes several things, or has a source that judges nothing.
    """

    PARTS: ClassVar[dict[str, str]] = {"modes": "sampling/decoders"}

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        task: str,
        rows: int = 500,
        modes: Mapping[str, Any] | None = None,
        prefix: str = "",
    ):
        check_counts("judged", rows=rows)
        found = tasks.get(task)
        if not rows or len(getattr(found, "fill", ())) != 1 or not hasattr(found.source, "judged"):
            known = [name for name, each in tasks.items() if len(each.fill) == 1 and hasattr(each.source, "judged")]
            raise ValueError(
                f"evaluator judged has task={task!r} and rows={rows}: give at least one row, and a task that makes one"
                f" thing and whose source judges it ({', '.join(known) or 'there is none'})"
            )
        self.task, self.rows, self.prefix, self._task = task, rows, prefix, found
        self.modes = dict(modes or {})

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Makes and judges in each mode; `seed` decides what is drawn."""
        asked = self._task.questions(self.rows)
        if not asked:
            raise ValueError(f"evaluator judged: task {self.task} has no sound held-out rows")
        asked = [asked[number % len(asked)] for number in range(self.rows)]
        scalars: dict[str, float] = {}
        for mode, decoder in self.modes.items() or [("", None)]:
            where = f"{self.prefix}{mode}/" if mode else self.prefix
            scalars |= {where + name: value for name, value in self._judged(pipeline, seed, asked, decoder).items()}
        return Result(scalars)

    def _judged(self, pipeline: Any, seed: int, asked: list[Any], decoder: Any) -> dict[str, float]:
        name = self._task.fill[0]
        decoders = None if decoder is None else {row_of(name): decoder}
        made = pipeline.values(self.task, asked, seed, decoders=decoders)[name]
        host = pipeline.fields[row_of(name)].codec.host
        made = [host.decode(each) if hasattr(host, "eos") else each for each in made]
        judged = [self._task.source.judged(*pair) for pair in zip(asked, made, strict=True)]
        scalars = {key: float(np.mean([each[key] for each in judged])) for key in judged[0]}
        if hasattr(self._task.source, "features"):
            found = [self._task.source.features(*pair) for pair in zip(asked, made, strict=True)]
            scalars["frechet"] = frechet_distance(*(np.concatenate(each) for each in zip(*found, strict=True)))
        return scalars
