"""What is known of a run, from the files of its workdir: facts, scores, curves, sample grids and its time."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from src.common.tree import listed
from src.tools.reports.run_files import LOG, METRICS, Curve, read_curves, read_metrics
from src.tools.reports.scores import RecordedScore, of_run, scores_of
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.read_params import CheckpointParams
from src.train.goodput import FILE, read_attempts, summary

SHOWN = ("loss", "heldout/", "eval/", "learning_rate", "grad_norm", "mfu", "tokens_per_second")  # curves
FACTS = ("parameters", "seconds_to_first_step", "seconds_total")


@dataclasses.dataclass(frozen=True)
class RunReport:
    """A run as JSON values.

    facts    config, steps, versions and checksums of the weights by checkpoint
    samples  by name, the step and path of the newest grid
    time     seconds by part over all restarts (`train/goodput.py`)
    missing  what is not there, and what was left out
    """

    workdir: str
    facts: Mapping[str, Any]
    scores: Sequence[RecordedScore]
    curves: Mapping[str, Curve]
    samples: Mapping[str, tuple[int, str]]
    time: Mapping[str, float]
    missing: Sequence[str]


def read_run(workdir: str, scores: Sequence[str] = ()) -> RunReport:
    """Reads a workdir, without changing it; `scores`: other reports of this run.

    Raises FileNotFoundError where there is no run, ValueError and OSError, in one sentence, for files that are not
    sound.
    """
    folder = epath.Path(workdir)
    if not any((folder / name).exists() for name in (LOG, METRICS, "checkpoints")):
        raise FileNotFoundError(f"there is no run in {workdir}: give the --workdir of one that has trained")
    facts, weights, missing = _facts(folder)
    found, gone = scores_of(workdir, scores)
    kept, told = of_run(found, workdir, weights)
    missing += gone + told
    curves = {name: curve for name, curve in read_curves(workdir).items() if name.startswith(SHOWN)}
    samples = newest_samples(folder / "samples")
    attempts = read_attempts(folder / FILE)
    missing += [] if curves else [f"curves: there is no {LOG}"]
    missing += [] if samples else ["sample grids: there are none in samples/"]
    missing += [] if attempts else [f"where the time went: there is no {FILE}"]
    return RunReport(workdir, facts, kept, curves, samples, summary(attempts) if attempts else {}, missing)


def _facts(folder: epath.Path) -> tuple[dict[str, Any], list[int], list[str]]:
    """Facts of the run, checksums of all weights that it has, and what is missing."""
    numbers, _ = read_metrics(folder / METRICS)
    facts: dict[str, Any] = {name: numbers[name] for name in FACTS if name in numbers}
    missing = [f"{name}: not in {METRICS}, the run is not done" for name in FACTS if name not in facts]
    missing = [f"{listed(FACTS)}: there is no {METRICS}"] if not numbers else missing
    weights: list[int] = []
    checkpoints: dict[str, Any] = {}
    if (folder / "checkpoints").exists():
        opened = Checkpointer(folder, readonly=True)
        for step in opened.all_steps():
            try:
                parts = {
                    "last": CheckpointParams(opened.directory / str(step)),
                    "average": CheckpointParams(opened.directory / str(step), average=True),
                }
            except ValueError as error:
                missing.append(f"the checkpoint of step {step}: {error}")
                continue
            checkpoints[str(step)] = {name: params.weights for name, params in parts.items()}
            weights += checkpoints[str(step)].values()
            config = parts["last"].config
            facts |= {
                "steps": config["steps"],
                "newest_checkpoint": step,
                "seed": config["seed"],
                "batch": config["batch"],
            }
            facts |= {"version": parts["last"].version, "initial_weights": config.get("weights"), "config": config}
    if not checkpoints:
        missing.append("config, version and weights: there is no checkpoint")
    return facts | {"checkpoints": checkpoints}, weights, missing


def newest_samples(folder: epath.Path) -> dict[str, tuple[int, str]]:
    """By name, the step and path of the newest `<name>-<step>.png`."""
    found: dict[str, tuple[int, str]] = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if match := re.fullmatch(r"(.+)-(\d+)\.png", path.name):
            name, step = match.group(1), int(match.group(2))
            if name not in found or found[name][0] < step:
                found[name] = step, os.fspath(path)
    return found


def plain(run: RunReport) -> dict[str, Any]:
    """JSON values."""
    told = dataclasses.asdict(run)
    return told | {"scores": [score._asdict() for score in run.scores], "missing": list(run.missing)}
