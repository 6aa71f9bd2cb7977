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
EVALUATED, HOW_TEXT = "eval/", "eval/how"  # of numbers of evaluators; the text that --mode=eval writes behind its own
Curve = list[tuple[int, float]]  # (step, value), by rising step


def read_curves(workdir: str | os.PathLike[str]) -> dict[str, Curve]:
    """The scalars of `log.jsonl` by name; of a step that is there twice the last line counts, and lines or values that
    are not sound are passed over. Evaluations by `--mode=eval`, which may have other settings, are left out; the text
    `eval/how` behind their numbers tells them apart.

    Empty where there is no log. Raises OSError, ValueError for what is no plain file.
    """
    path = epath.Path(workdir) / LOG
    check_plain(path)
    found: dict[str, dict[int, float]] = {}
    if not path.exists():
        return {}
    evaluated: dict[tuple[str, int], float] = {}  # not yet known to be of the run itself

    def keep() -> None:
        for (name, step), value in evaluated.items():
            found.setdefault(name, {})[step] = value
        evaluated.clear()

    with path.open("rb") as file:
        for line in bounded_lines(file):
            step, told = _parsed(line)
            numbers = {name: float(value) for name, value in told.items() if _is_number(name, value)}
            if HOW_TEXT in told:
                evaluated.clear()
            elif numbers and all(name.startswith(EVALUATED) for name in numbers):
                if any((name, step) in evaluated for name in numbers):
                    keep()  # the same numbers once more: another evaluation begins
                evaluated |= {(name, step): value for name, value in numbers.items()}
            elif numbers:
                keep()
                for name, value in numbers.items():
                    found.setdefault(name, {})[step] = value
    keep()
    return {name: sorted(values.items()) for name, values in found.items()}


def _parsed(line: bytes) -> tuple[int, dict[str, Any]]:
    try:
        read = json.loads(line)
        return int(read["step"]), read
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return 0, {}


def _is_number(name: str, value: Any) -> bool:
    return name not in ("step", "time") and type(value) in (int, float) and math.isfinite(value)


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
