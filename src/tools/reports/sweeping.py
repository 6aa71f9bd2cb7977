"""The measurements of a sweep: results that are kept, evaluators or drawn images, table and plot."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import logging
from etils import epath

from src.common.files.store import write_named
from src.common.files.strict_json import read_json
from src.common.runtime import config_flag
from src.common.tree import listed
from src.tools.reports.plots import Line, Panel
from src.tools.reports.sweep_axes import STEP, Axis, Point, changed, overrides
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import plain
from src.train.checkpoints.metadata import VERSION
from src.train.checkpoints.read_params import CheckpointParams

FILE = "sweep.json"
Measure = Callable[[Point], tuple[dict[str, float], dict[str, Any]]]  # numbers, and how they were measured


class Results:
    """What is measured, in `<folder>/sweep.json`, by point; `about` is what all numbers have in common.

    Raises ValueError where the folder holds another sweep.
    """

    def __init__(self, folder: str, about: Mapping[str, Any]):
        self.folder, self.path = folder, os.path.join(folder, FILE)
        self._told: dict[str, Any] = {"about": json.loads(json.dumps(about)), "points": []}
        if epath.Path(self.path).exists():
            before = read_json(self.path, finite=False, what="results")
            wrong = [name for name, value in self._told["about"].items() if before.get("about", {}).get(name) != value]
            if wrong:
                raise ValueError(
                    f"{folder} holds another sweep ({listed(wrong)} differ): give another --out, or remove it"
                )
            self._told = before

    def has(self, point: Point) -> bool:
        """Whether it is measured."""
        return self._find(point) is not None

    def numbers(self, point: Point) -> dict[str, float]:
        """Its numbers. Raises KeyError if it is not measured."""
        found = self._find(point)
        if found is None:
            raise KeyError(f"{told(point)} is not measured")
        return found["numbers"]

    def add(self, point: Point, numbers: Mapping[str, float], setting: Mapping[str, Any]) -> None:
        """Keeps a measurement."""
        self._told["points"].append({"point": point, "numbers": dict(numbers), "setting": dict(setting)})
        write_named(self.path, (json.dumps(self._told, indent=1) + "\n").encode(), "results")

    def _find(self, point: Point) -> dict[str, Any] | None:
        wanted = json.loads(json.dumps(point))
        return next((each for each in self._told["points"] if each["point"] == wanted), None)


def about_of(values: Any, config: Any) -> dict[str, Any]:
    """What all numbers of a sweep have in common; a run that has gone on since is another one.

    Raises FileNotFoundError where there is no checkpoint, ValueError for one that is damaged.
    """
    opened = Checkpointer(values.workdir, readonly=True)
    if (newest := opened.latest_step()) is None:
        raise FileNotFoundError(f"there is no checkpoint in {values.workdir}; train first, or correct --workdir")
    weights = CheckpointParams(opened.directory / str(newest)).weights
    about = {"version": VERSION, "workdir": os.path.abspath(values.workdir), "config": config_flag.name_of(values)}
    about["newest"] = {"step": newest, "weights": weights}
    about |= {"overrides": plain(config_flag.overrides(values))}
    if values.reference:
        names = ("reference", "network", "weights", "count", "seed", "task", "prompts")
        return about | {name: values[name].value for name in names}
    return about | {"evaluators": plain(config.eval.evaluators), "seed": int(config.seed)}


def told(point: Mapping[str, Any]) -> str:
    """A point in words."""
    return ", ".join(f"{name} {value}" for name, value in point.items())


def evaluator(values: Any, config: Any) -> Measure:
    """Measures with the config's evaluators, in this process; each checkpoint is read once."""
    from src.build import build_system, rows_of
    from src.common.mesh import distributed
    from src.common.runtime import cpu_devices
    from src.common.runtime.compilation_cache import use_program_cache
    from src.common.runtime.writers import Many
    from src.tools.datasets import debug_files

    if text := cpu_devices.start(config, rows_of(config), values.cpu_devices):
        logging.info("%s", text)
    distributed.start()
    use_program_cache()
    debug_files.fill_for(values)
    from src.train import loop
    from src.train.average import used_params
    from src.train.restored import restore_checkpoint
    from src.train.setting import setting_of
    from src.train.trainer import check_evaluators

    read: dict[Any, Any] = {}

    def measure(point: Point) -> tuple[dict[str, float], dict[str, Any]]:
        now = changed(config, point)
        system, key = build_system(now), (str(point.get(STEP, "latest")), now.eval.width)
        if not read:
            check_evaluators(system)
        if key not in read:
            read.clear()
            read[key] = restore_checkpoint(system, values.workdir, key[0])
        state = read[key]
        measured: dict[str, Any] = {}  # what the evaluators say that their numbers depend on
        found = loop.evaluate(system, state, Many([]), int(state.step), measured)
        setting = {"step": int(state.step), "seed": int(now.seed)} | setting_of(now, used_params(state, now))
        return found, setting | ({"measured": measured} if measured else {})

    return measure


def scorer(values: Any, out: str) -> Measure:
    """Draws images and scores them, each by its own command in a process of its own; both go on after a stop."""
    file = config_flag.name_of(values)
    given = [f"--config.{path}={value}" for path, value in config_flag.overrides(values).items()]
    config = values["config"].value

    def measure(point: Point) -> tuple[dict[str, float], dict[str, Any]]:
        mark = hashlib.sha256(json.dumps(point, sort_keys=True).encode()).hexdigest()[:8]
        folder = os.path.join(out, f"drawn-{mark}")
        draw = ["src.tools.draw", f"--config={file}", f"--workdir={values.workdir}", f"--out={folder}", *given]
        draw += [f"--count={values.count}", f"--seed={values.seed or 0}", f"--step={point.get(STEP, 'latest')}"]
        draw += [f"--{name}={values[name].value}" for name in ("task", "prompts") if values[name].value]
        draw += [f"--cpu_devices={values.cpu_devices}"] if values.cpu_devices else []
        draw += [f"--config.{path}={value}" for path, value in overrides(point, config).items()]
        report = os.path.join(out, f"scores-{mark}.json")
        score = ["src.tools.scores", f"--images={folder}", f"--reference={values.reference}", f"--json={report}"]
        score += [f"--network={values.network}"] + ([f"--weights={values.weights}"] if values.weights else [])
        score += [f"--prompts={values.prompts}"] if values.network == "clip" and values.prompts else []
        for words in (draw, score):
            _started(words)
        found = read_json(report, finite=False, what="report")
        return found["scores"], {name: found[name] for name in ("images", "reference", "network", "warnings")}

    return measure


def _started(words: Sequence[str]) -> None:
    done = subprocess.run([sys.executable, "-m", *words], stdout=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed (exit code {done.returncode}), as told above; the same command goes on")


def table(axes: Sequence[Axis], rows: Sequence[tuple[Point, Mapping[str, float]]], names: Sequence[str]) -> str:
    """A Markdown table: a row for each point, in the order of the points."""
    head = [*(axis.name for axis in axes), *(f"`{name}`" for name in names)]
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    for point, numbers in rows:
        values = [f"{numbers[name]:.4f}" if name in numbers else "" for name in names]
        lines.append(f"| {' | '.join([*(str(point[axis.name]) for axis in axes), *values])} |")
    return "\n".join(lines)


def panels(
    axes: Sequence[Axis], rows: Sequence[tuple[Point, Mapping[str, float]]], names: Sequence[str]
) -> list[Panel]:
    """The first metric against each axis of numbers, and against each other metric.

    A line has the points that differ in one axis alone: that of the plot, or for two metrics the first one.
    """
    found = []
    for axis in axes:
        if len(axis.values) > 1 and all(isinstance(value, int | float) for value in axis.values):
            lines = _lines(axis, axes, rows, lambda point, numbers, name=axis.name: point[name], names[0])
            found.append(Panel(f"{names[0]} by {axis.name}", lines, axis.name, names[0]))
    for name in names[1:]:
        lines = _lines(axes[0], axes, rows, lambda point, numbers, name=name: numbers.get(name), names[0], "o-", False)
        found.append(Panel(f"{names[0]} against {name}", lines, name, names[0]))
    return [panel for panel in found if panel.lines]


def _lines(
    along: Axis, axes: Sequence[Axis], rows: Any, value: Callable[..., Any], metric: str, mark: str = "o-",
    sort: bool = True,
) -> dict[str, Line]:  # fmt: skip
    groups: dict[str, list[tuple[float, float]]] = {}
    for point, numbers in rows:
        x = value(point, numbers)
        if metric in numbers and x is not None:
            label = told({axis.name: point[axis.name] for axis in axes if axis is not along and len(axis.values) > 1})
            groups.setdefault(label, []).append((x, numbers[metric]))
    ordered = {label: sorted(pairs) if sort else pairs for label, pairs in groups.items()}
    return {label: Line(*zip(*pairs, strict=True), None, mark) for label, pairs in ordered.items()}
