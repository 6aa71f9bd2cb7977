"""Finding the tasks that an evaluator needs, by what they make and of which source, and asking the pipeline for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def starts(task: Any) -> tuple[str, ...]:
    """Values of an example that the task starts from and must have."""
    return tuple(value for value in task.template.needs if value not in task.template.answers)


def find_task(
    tasks: Mapping[str, Any], evaluator: str, option: str, name: str, source: type, start: str, makes: str
) -> Any:
    """The task that an evaluator's option names: it makes the value `makes` of `start`, for examples of a `source`.

    Raises ValueError if there is no task of this name, or if it does something else.
    """
    wanted = f"the name of a task that makes the {makes} for the {start} of {source.__name__}"
    if name not in tasks:
        raise ValueError(
            f"evaluator {evaluator} has {option}={name!r}, but the config has no such task, only "
            f"{', '.join(tasks) or 'none'}: set {option} to {wanted}"
        )
    task = tasks[name]
    found = makes in task.template.answers and (start in starts(task) or start == "prompt")
    if not found or not isinstance(task.source, source):
        raise ValueError(
            f"evaluator {evaluator} has {option}={name!r}, which makes {', '.join(task.fill)} for examples of "
            f"{type(task.source).__name__}: set {option} to {wanted}"
        )
    return task


def count_classes(fields: Mapping[str, Any], task: Any) -> int:
    """Number of classes that a task draws from."""
    field = fields.get(getattr(task.template, "label", "label"))
    host = None if field is None else field.codec.host
    return host.count if hasattr(host, "count") else len(task.source.classes)


def images_of(pipeline: Any, name: str, task: Any, given: Sequence[Mapping[str, Any]], seed: int) -> np.ndarray:
    """The images [n, h, w, C] that a task makes, about in [-1, 1]."""
    return np.asarray(pipeline.values(name, given, seed)[task.fill[0]])


def texts_of(pipeline: Any, name: str, task: Any, given: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """The texts that a task makes."""
    return [made[task.fill[0]] for made in pipeline(name, given, seed)]
