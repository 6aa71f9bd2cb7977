"""What the files of a workdir say: the scalars of its log, and its numbers with how they were measured."""

from __future__ import annotations

import json
import math
import os
from typing import Any

from etils import epath

from src.common.files.paths import bounded_lines, check_plain
from src.common.files.strict_json import read_json
from src.evals.metrics_file import HOW

LOG, METRICS = "log.jsonl", "metrics.json"
Curve = list[tuple[int, float]]  # (step, value), by rising step


def read_curves(workdir: str | os.PathLike[str]) -> dict[str, Curve]:
    """The scalars of `log.jsonl` by name; of a step that is there twice the last line counts, and lines or values that
    are not sound are passed over. Empty where there is no log. Raises OSError, ValueError for what is no plain file."""
    path = epath.Path(workdir) / LOG
    check_plain(path)
    found: dict[str, dict[int, float]] = {}
    if not path.exists():
        return {}
    with path.open("rb") as file:
        for line in bounded_lines(file):
            for name, value in _scalars(line):
                found.setdefault(name, {})[value[0]] = value[1]
    return {name: sorted(values.items()) for name, values in found.items()}


def _scalars(line: bytes) -> list[tuple[str, tuple[int, float]]]:
    try:
        read = json.loads(line)
        step = int(read["step"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return []
    kinds = (int, float)
    told = {name: value for name, value in read.items() if name not in ("step", "time") and type(value) in kinds}
    return [(name, (step, float(value))) for name, value in told.items() if math.isfinite(value)]


def read_metrics(path: str | os.PathLike[str]) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """The numbers of a `metrics.json`, and how those of evaluators were measured, by name; both empty without the file.

    Raises OSError, ValueError, in one sentence, for a file that is not sound.
    """
    if not epath.Path(path).exists():
        return {}, {}
    read = read_json(path, finite=False)
    if not isinstance(read, dict) or not isinstance(how := read.pop(HOW, {}), dict):
        raise ValueError(f"{os.fspath(path)} is no metrics.json of a run: evaluate the run again with --mode=eval")
    numbers = {name: value for name, value in read.items() if type(value) in (int, float)}
    return numbers, {name: told for name, told in how.items() if isinstance(told, dict)}
