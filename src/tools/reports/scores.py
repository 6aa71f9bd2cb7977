"""The scores of a run, each with the setting that it was measured with, from all files that have some."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from etils import epath

from src.common.files.strict_json import read_json
from src.tools.reports.run_files import read_metrics

# Of a setting, what may differ between two scores that are compared; all else must be the same.
FREE = ("config", "overrides", "trained_with", "seed", "weights", "version", "workdir", "path")
RECORDED = ("step", "ema", "seed", "guidance", "decode", "samplers", "evaluators", "weights", "version")
NONE = "not recorded"


class RecordedScore(NamedTuple):
    """A number, the file that it is from, and its setting by name, JSON values."""

    name: str
    value: float
    source: str
    setting: Mapping[str, Any]

    @property
    def key(self) -> str:
        """Equal for scores that may be compared."""
        return json.dumps([self.name, {k: v for k, v in self.setting.items() if k not in FREE}], sort_keys=True)


def scores_of(workdir: str, others: Sequence[str] = ()) -> tuple[list[RecordedScore], list[str]]:
    """The scores in `metrics*.json` and other reports of the workdir, and in the files `others`; and what is missing.

    Reports are those of `src.tools.scores`, `lm_eval` and `perplexity` (--json). Raises FileNotFoundError for one of
    `others` that is not there, ValueError for one that is no report.
    """
    folder, found, missing = epath.Path(workdir), [], []
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    for name in [name for name in names if re.fullmatch(r"metrics(-\d+)?\.json", name)]:
        numbers, how = read_metrics(folder / name)
        for score, told in how.items():
            if score in numbers:
                setting = {part: told.get(part, NONE) for part in RECORDED} | told
                found.append(RecordedScore(score, float(numbers[score]), name, setting))
    if not found:
        missing.append("scores of evaluators: no metrics.json with an evaluation (src.main --mode=eval makes one)")
    for name in [name for name in names if name.endswith(".json") and not name.startswith("metrics")]:
        found += _report(os.path.join(workdir, name), name) or []
    for path in others:
        if not epath.Path(path).exists():
            raise FileNotFoundError(f"there is no file {path}: correct --scores")
        scores = _report(path, path)
        if scores is None:
            raise ValueError(
                f"{path} is no report of src.tools.scores, lm_eval or perplexity (--json): correct --scores"
            )
        found += scores
    return once(found), missing


def once(scores: Sequence[RecordedScore]) -> list[RecordedScore]:
    """Each score once, where a file was named that lies in the workdir, too."""
    seen: dict[tuple[str, float], RecordedScore] = {}
    for score in scores:
        seen.setdefault((score.key, score.value), score)
    return list(seen.values())


def of_run(
    scores: Sequence[RecordedScore], workdir: str, weights: Sequence[int]
) -> tuple[list[RecordedScore], list[str]]:
    """The scores of a run whose checkpoints have these checksums of `weights`; and what is said of others.

    A score of another workdir is left out, unless its weights are those of a checkpoint.
    """
    kept, told = [], []
    for score in scores:
        place, mark = score.setting.get("workdir"), score.setting.get("weights")
        if mark in weights or place is None or os.path.abspath(str(place)) == os.path.abspath(workdir):
            kept.append(score)
        else:
            told.append(f"{score.source} is of another run ({place}, weights {mark}): left out")
    gone = sorted({str(s.setting["step"]) for s in kept if s.setting.get("weights", NONE) not in (*weights, NONE)})
    if gone:
        told.append(f"the weights of the scores of step {', '.join(gone)} are of no checkpoint that is still here")
    old = sorted({score.source for score in kept if NONE in score.setting.values()})
    told += [f"settings of {name}: not all were recorded (a version before them measured it)" for name in old]
    return kept, list(dict.fromkeys(told))


def _report(path: str, source: str) -> list[RecordedScore] | None:
    """The scores of a report of another tool, None for a file that is none."""
    try:
        told = read_json(path, finite=False)
    except (OSError, ValueError):
        return None
    if not isinstance(told, dict):
        return None
    if isinstance(told.get("scores"), dict) and isinstance(told.get("images"), dict):
        return _of_images(told, source)
    if isinstance(told.get("model"), dict) and isinstance(told.get("results"), dict):
        return _of_language(told, source)
    if isinstance(told.get("model"), dict) and "bits_per_byte" in told:
        setting = {**told["model"], **_group(told, "setting"), "tokens": told.get("tokens"), "bytes": told.get("bytes")}
        return [RecordedScore(name, float(told[name]), source, setting) for name in ("perplexity", "bits_per_byte")]
    return None


def _of_images(told: Mapping[str, Any], source: str) -> list[RecordedScore]:
    images = dict(told["images"])
    drawn = images.pop("drawn", {})
    reference = told.get("reference")
    reference = {k: v for k, v in reference.items() if k != "path" or "sha256" not in reference} if reference else None
    network = told.get("network")
    network = {k: v for k, v in network.items() if k != "path"} if isinstance(network, dict) else network
    setting = {k: v for k, v in images.items() if k != "path"} | drawn | {"count": images.get("count")}
    setting |= {"reference": reference, "network": network} | ({"prompts": p} if (p := told.get("prompts")) else {})
    return [RecordedScore(k, float(v), source, setting) for k, v in told["scores"].items() if type(v) in (int, float)]


def _of_language(told: Mapping[str, Any], source: str) -> list[RecordedScore]:
    setting = {**told["model"], **_group(told, "setting"), "lm_eval": told.get("lm_eval")}
    found = []
    for task, values in told["results"].items():
        for name, value in values.items() if isinstance(values, dict) else ():
            if type(value) in (int, float) and "stderr" not in name:
                found.append(RecordedScore(f"{task}/{name.removesuffix(',none')}", float(value), source, setting))
    return found


def _group(told: Mapping[str, Any], name: str) -> dict[str, Any]:
    value = told.get(name)
    return dict(value) if isinstance(value, dict) else {}


class Pair(NamedTuple):
    """A score of two runs with the same setting."""

    name: str
    first: RecordedScore
    second: RecordedScore


def paired(first: Sequence[RecordedScore], second: Sequence[RecordedScore]) -> tuple[list[Pair], list[str]]:
    """The scores that both runs have with the same setting; and for each other one why it is not compared."""
    by_key = {score.key: score for score in second}
    pairs = [Pair(score.name, score, by_key[score.key]) for score in first if score.key in by_key]
    done = {score.key for pair in pairs for score in pair[1:]}
    apart = []
    for score in [score for score in first if score.key not in done]:
        others = [other for other in second if other.name == score.name and other.key not in done]
        ways = [differences(score.setting, other.setting) for other in others]
        apart.append(f"{score.name}: " + (min(ways, key=len) if ways else "the second run has none"))
    names = {score.name for score in first}
    apart += [f"{s.name}: the first run has none" for s in second if s.name not in names and s.key not in done]
    return pairs, list(dict.fromkeys(apart))


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """What differs between two settings that must be the same, in words."""
    flat = [_flat(setting) for setting in (one, other)]
    names = [k for k in dict.fromkeys([*flat[0], *flat[1]]) if flat[0].get(k, NONE) != flat[1].get(k, NONE)]
    return ", ".join(f"{name} {flat[0].get(name, NONE)} and {flat[1].get(name, NONE)}" for name in names)


def _flat(setting: Any, path: str = "") -> dict[str, Any]:
    if not isinstance(setting, dict):
        return {path: setting}
    found: dict[str, Any] = {}
    for name, value in setting.items():
        if path or name not in FREE:
            found |= _flat(value, f"{path}.{name}" if path else name)
    return found
