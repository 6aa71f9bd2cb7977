"""`metrics.json` of a run: the numbers of its evaluations, and beside each how it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from absl import logging
from etils import epath

from src.common.files.store import write_whole
from src.common.files.strict_json import read_json

HOW = "how"


def merge_metrics(path: epath.Path, metrics: Mapping[str, float], how: Mapping[str, Mapping[str, Any]]) -> dict:
    """Writes the numbers into a file and returns all that it holds now; what was not measured again stays as it was.

    how   by number, what was evaluated: it stands in the file's group "how" under the same name. A number that is
          written anew without it loses that of before

    A file that cannot be read is written anew, with a warning.
    """
    before: dict[str, Any] = {}
    try:
        before = read_json(path, finite=False) if path.exists() else {}
        told = dict(before.pop(HOW, {}))
        before = {name: _rounded(value) for name, value in before.items() if isinstance(value, int | float)}
    except (ValueError, TypeError, AttributeError) as error:
        logging.warning("%s is written anew: %s", path, error)
        before, told = {}, {}
    numbers = before | {name: _rounded(value) for name, value in metrics.items()}
    told = {name: each for name, each in told.items() if name not in metrics} | dict(how)
    text = json.dumps(numbers | {HOW: told}, indent=2)
    write_whole(path, (text + "\n").encode())
    return numbers


def _rounded(value: Any) -> float | int:
    return round(float(value), 5) if isinstance(value, float) else int(value)
