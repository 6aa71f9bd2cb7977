"""What a task makes of an example, and what it starts from, in the names of the source's values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from src.data.example import BadRow
from src.data.splits import example_of, numbers_of, rows_of
from src.evals.result import spread
from src.interfaces import row_of


def made_values(task: Any) -> set[str]:
    """Values of an example that the task makes: "image", "caption", …"""
    template, found = task.template, set()
    for name in task.fill:
        found |= {row_of(name), name.partition(".")[2]}
        if row_of(name) == getattr(template, "image", None):
            found.add("image")
        if row_of(name) == getattr(template, "text", None):
            found |= {getattr(template, "caption", ""), getattr(template, "value", "")}
    return found - {""}


def start_values(task: Any) -> tuple[str, ...]:
    """Values of an example that the task starts from and must have."""
    return tuple(value for value in task.template.needs if value not in made_values(task))


def text_value(task: Any) -> str:
    """The value that the words of a prompt are: what the task draws, or the beginning of what it writes."""
    caption = getattr(task.template, "caption", None)
    return caption if caption and caption not in made_values(task) else "prompt"


def prompt_of(task: Any, example: Mapping[str, Any]) -> dict[str, Any]:
    """An example without what is to be made."""
    made = made_values(task)
    return {name: value for name, value in example.items() if name not in made}


def held_out(task: Any, most: int) -> list[dict[str, Any]]:
    """Prompts of at most so many examples of the split "test", spread over it; bad rows are left out.

    Raises what opening the source raises.
    """
    prompts = []
    for index in spread(rows_of(task.source, "test"), most):
        try:
            example = example_of(task.source, int(numbers_of(task.source, "test", np.asarray(index))))
        except BadRow:
            continue
        prompts.append(prompt_of(task, example))
    return prompts


def title(example: Mapping[str, Any]) -> str:
    """What an image of the example was asked for by, in words."""
    for name in ("caption", "prompt", "label"):
        value = example.get(name)
        value = value[0] if isinstance(value, list | tuple) and value else value
        if isinstance(value, str | int | np.integer):
            return f"class {value}" if name == "label" else str(value)
    return ""
