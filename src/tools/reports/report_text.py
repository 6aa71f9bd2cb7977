"""Reports of one or two runs as Markdown."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from src.tools.reports.plots import Line, Panel
from src.tools.reports.run_files import Curve
from src.tools.reports.run_report import RunReport
from src.tools.reports.scores import NONE, RecordedScore, paired

PARTS = {"guidance": "guidance", "decode": "decoders", "samplers": "samplers", "evaluators": "evaluators"}
CURVES = ("loss", "heldout/", "eval/")  # those that are drawn


def report_of(runs: Sequence[RunReport], folder: str, plot: str | None) -> str:
    """The report of one run, or of two side by side. `folder` is where it will lie; `plot` the file of the curves."""
    first = runs[0]
    title = " and ".join(run.workdir for run in runs)
    parts = [f"# Report: {title}", facts(runs)]
    if len(runs) == 2:
        parts.append(compared(*runs))
    for run in runs:
        mark = f" of {run.workdir}" if len(runs) == 2 else ""
        parts.append(f"## Scores{mark}\n\n" + (scores(run.scores) or "None."))
    parts += [samples(runs, folder), curves(runs, plot)]
    parts.append("## Time\n\n" + _table(["", *(run.workdir for run in runs)], _times(runs)) if first.time else "")
    gone = [f"- {run.workdir}: {text}" for run in runs for text in run.missing]
    parts.append("## Missing\n\n" + ("\n".join(gone) or "Nothing."))
    return "\n\n".join(part for part in parts if part) + "\n"


def facts(runs: Sequence[RunReport]) -> str:
    """A table of what each run is."""
    names = dict.fromkeys(name for run in runs for name in run.facts if name not in ("config", "checkpoints"))
    rows = [[name, *(_text(run.facts.get(name, NONE)) for run in runs)] for name in names]
    steps = dict.fromkeys(step for run in runs for step in run.facts["checkpoints"])
    for step in steps:
        for part in ("last", "average"):
            told = [run.facts["checkpoints"].get(step, {}).get(part, "") for run in runs]
            rows.append([f"weights of step {step}, {part}", *map(str, told)])
    return _table(["", *(run.workdir for run in runs)], rows)


def scores(found: Sequence[RecordedScore]) -> str:
    """A table for each setting, below what the setting is: scores of two settings are never in one table."""
    groups: dict[str, list[RecordedScore]] = {}
    for score in found:
        groups.setdefault(json.dumps([score.source, score.setting], sort_keys=True, default=str), []).append(score)
    parts = []
    for number, group in enumerate(groups.values(), 1):
        rows = [[f"`{score.name}`", f"{score.value:,.5g}"] for score in group]
        about = "\n".join(f"- {line}" for line in setting(group[0].setting))
        parts.append(f"### Setting {number}, of {group[0].source}\n\n{about}\n\n" + _table(["score", "value"], rows))
    return "\n\n".join(parts)


def setting(told: Mapping[str, Any]) -> list[str]:
    """A setting in lines: single values in one, each group in one of its own."""
    plain = {name: str(value) if name == "weights" else _text(value) for name, value in told.items()}  # as in files
    single = [f"{name} {plain[name]}" for name, value in told.items() if not isinstance(value, dict)]
    groups = [f"{PARTS.get(name, name)}: {_inside(value)}" for name, value in told.items() if isinstance(value, dict)]
    return [", ".join(single), *(line for line in groups if not line.endswith(": "))]


def compared(first: RunReport, second: RunReport) -> str:
    """The scores that both have with the same setting, and why the others are not compared."""
    pairs, apart = paired(first.scores, second.scores)
    rows = []
    for name, one, other in pairs:
        step = one.setting.get("step", "")
        values = [f"{one.value:,.5g}", f"{other.value:,.5g}", f"{other.value - one.value:+,.4g}"]
        rows.append([f"`{name}`", one.source, str(step), *values])
    text = "## Side by side\n\nOnly scores of the same step and setting are compared.\n\n"
    head = ["score", "file", "step", first.workdir, second.workdir, "difference"]
    text += _table(head, rows) if rows else "No score of both was measured alike."
    return text + ("\n\nNot compared:\n\n" + "\n".join(f"- {line}" for line in apart) if apart else "")


def samples(runs: Sequence[RunReport], folder: str) -> str:
    """The newest grid of each name, side by side."""
    names = dict.fromkeys(name for run in runs for name in run.samples)
    parts = []
    for name in names:
        cells = []
        for run in runs:
            step, path = run.samples.get(name, (0, ""))
            place = path if "://" in path else os.path.relpath(path, folder) if path else ""
            cells.append(f"step {step}<br>![{name}]({place})" if path else "none")
        parts.append(f"### {name}\n\n" + _table([run.workdir for run in runs], [cells]))
    return "## Samples\n\n" + "\n\n".join(parts) if parts else ""


def curves(runs: Sequence[RunReport], plot: str | None) -> str:
    """The last value of each curve, and the plot."""
    names = dict.fromkeys(name for run in runs for name in run.curves)
    rows = [[f"`{name}`", *(_last(run.curves.get(name)) for run in runs)] for name in names]
    text = f"![curves]({os.path.basename(plot)})\n\n" if plot else ""
    return f"## Curves\n\n{text}" + _table(["last value", *(run.workdir for run in runs)], rows) if rows else ""


def panels(runs: Sequence[RunReport]) -> list[Panel]:
    """A panel for each loss, held-out loss and number of an evaluator that changed over the steps."""
    names = [n for n in dict.fromkeys(name for run in runs for name in run.curves) if n.startswith(CURVES)]
    found = []
    for name in names:
        have = {run.workdir: run.curves[name] for run in runs if len(run.curves.get(name, ())) > 1}
        if have:
            found.append(Panel(name, {label: Line(*zip(*curve, strict=True)) for label, curve in have.items()}))
    return found


def _last(curve: Curve | None) -> str:
    return f"{curve[-1][1]:.5g} at step {curve[-1][0]}" if curve else ""


def _times(runs: Sequence[RunReport]) -> list[list[str]]:
    names = dict.fromkeys(name for run in runs for name in run.time)
    return [[f"`{name}`", *(f"{run.time[name]:,.4g}" if name in run.time else "" for run in runs)] for name in names]


def _inside(value: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {_text(each)}" for name, each in value.items() if each not in (None, {}))


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, dict):
        return "(" + _inside(value) + ")"
    if isinstance(value, float) and not float(value).is_integer():
        return f"{value:,.6g}"
    return f"{value:,}" if type(value) is int and abs(value) < 10**9 else str(value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    return "\n".join(lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows])
