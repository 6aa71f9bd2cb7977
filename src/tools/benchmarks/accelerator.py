"""`bench --preset=accelerator`: what one GPU or TPU chip does with the paper's model, within some minutes.

Each part (`accelerator_parts.py`) is a process of its own: it has the whole memory of the chip, and what ends it is a
line of the result, as is a part that takes too long. Figures come as they are found and are kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from src.train.checkpoints.metadata import VERSION

LIMITS = {"attention": 90, "step": 240, "peer": 150, "drawing": 90, "decoding": 60, "encoders": 75}  # seconds
REASONS = ("failed", "skipped", "not_run")  # in place of figures
LEAST = 15.0  # seconds that a part needs to be begun
SECONDS = 3.0  # how long each action is measured
ROOT = pathlib.Path(__file__).parents[3]
CHILD = "src.tools.benchmarks.accelerator_parts"


def measure(
    minutes: float, say: Callable[[str], None], parts: tuple[str, ...] = tuple(LIMITS), command: Any = None
) -> dict[str, Any]:
    """Figures by part, then by name; what failed, was skipped or not run has its reason in place of figures.

    minutes   after which what is left is named as not run
    command   of a part, for tests

    Raises ValueError for an unknown part and for no time at all.
    """
    unknown = [part for part in parts if part not in LIMITS]
    if unknown:
        raise ValueError(f"--only={unknown[0]} is no part of --preset=accelerator; there are {', '.join(LIMITS)}")
    if not minutes > 0:
        raise ValueError(f"--minutes={minutes:g} leaves no time; give e.g. 8")
    end, found, known = time.monotonic() + 60 * minutes, {}, {}
    for part in parts:
        left = end - time.monotonic()
        if left < min(LEAST, 6 * minutes):
            found[part] = {"all": {"not_run": f"the {minutes:g} minutes were over"}}
            continue
        limit = min(LIMITS[part], left)
        say(f"{part}, at most {limit:.0f} s")
        found[part] = run_part(part, limit, say, command or default_command, known)
    if "step" in found and "peer" in found:
        found["ratio"] = ratios(found["step"], found["peer"])
    where = known.get("where", {}) | {
        "chip": known.get("chip"),
        "tiny": known.get("tiny", False),
        "config": "--preset=accelerator",
        "version": VERSION,
    }
    return {name: group | {"where": where} for name, group in found.items()}


def told(known: Mapping[str, Any]) -> str:
    """What the figures are of, in one line."""
    if known["tiny"]:
        return "no accelerator here: tiny sizes on the CPU, which rehearse the parts and measure nothing"
    if known["peak"] is None:
        return f"{known['where']['machine']}: no published peak is known, so mfu is of the measured products alone"
    return f"{known['where']['machine']}: {known['peak'] / 1e12:.0f} TFLOP/s in bf16 as published"


def default_command(part: str) -> list[str]:
    """The process of a part."""
    return [sys.executable, "-m", CHILD, part, str(SECONDS)]


def run_part(
    part: str, limit: float, say: Callable[[str], None], command: Callable[[str], list[str]], known: dict[str, Any]
) -> dict[str, Any]:
    """Figures by name of a process that is ended after `limit` seconds; what it says of the machine goes to `known`."""
    environment = dict(os.environ)
    environment.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    if part == "peer":  # the memory of a GPU is PyTorch's
        environment["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    child = subprocess.Popen(
        command(part), stdout=subprocess.PIPE, env=environment, text=True, errors="replace", start_new_session=True
    )
    lines: queue.Queue[str | None] = queue.Queue()

    def read() -> None:
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    figures, open_name, end, ended = {}, "", time.monotonic() + limit, ""
    try:
        while (line := lines.get(timeout=max(0.0, end - time.monotonic()))) is not None:
            said = _said(line)
            if "about" in said:
                if not known:
                    say(told(said["about"]))
                known.update(said["about"])
            elif "begins" in said:
                open_name = said["begins"]
                say(f"{part}: {open_name}")
            elif "name" in said:
                figures[said["name"]], open_name = said["figures"], ""
            elif "done" in said:
                break
        else:
            code = child.wait(max(1.0, end - time.monotonic()))
            ended = f"its process ended with {ending(code)}" if code else ""
    except (queue.Empty, subprocess.TimeoutExpired):
        ended = f"not done within {limit:.0f} s"
    finally:
        with contextlib.suppress(ProcessLookupError):  # with what it has started, as the compilers of PyTorch
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    return figures | ({open_name or "the rest": {"failed": ended}} if ended else {})


def _said(line: str) -> dict[str, Any]:
    """A line of a part; of what libraries print nothing."""
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def ending(code: int) -> str:
    """How a process ended."""
    return f"exit code {code}" if code > 0 else signal.Signals(-code).name


def ratios(ours: Mapping[str, Any], peer: Mapping[str, Any]) -> dict[str, Any]:
    """By number of rows, the fastest step of PyTorch over our fastest: above 1, ours is faster."""
    best: list[dict[int, float]] = []
    for side in (ours, peer):
        times: dict[int, float] = {}
        for figures in side.values():
            if "seconds" in figures:
                rows, median = figures["rows"], figures["seconds"]["median"]
                times[rows] = min(times.get(rows, median), median)
        best.append(times)
    shared = sorted(best[0].keys() & best[1].keys())
    found = {f"{rows} rows": {"slower_than_ours": best[1][rows] / best[0][rows]} for rows in shared}
    return found or {"all": {"skipped": "no number of rows was measured of both"}}


def markdown(figures: Mapping[str, Any], number: Callable[[Any], str]) -> str:
    """A table for each part; times are medians. What has no figures has its reason."""
    where = next(iter(figures.values()))["where"]
    lines = [", ".join(f"{name} {value}" for name, value in where.items() if value is not None)]
    for part, group in figures.items():
        rows = {name: _medians(each) for name, each in group.items() if name != "where"}
        measured = [each for each in rows.values() if not each.keys() & set(REASONS)]
        columns = list(dict.fromkeys(column for each in measured for column in each))
        lines += ["", f"## {part}", ""]
        if columns:
            lines += ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for name, each in rows.items():
            if each in measured:
                cells = (number(each[column]) if column in each else "" for column in columns)
                lines.append(f"| {name} | " + " | ".join(cells) + " |")
        reasons = [(name, why, each[why]) for name, each in rows.items() for why in REASONS if why in each]
        lines += [""] if columns and reasons else []
        lines += [f"- {name}: {why.replace('_', ' ')}: {text}" for name, why, text in reasons]
    return "\n".join(lines) + "\n"


def _medians(figures: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value["median"] if isinstance(value, Mapping) else value for name, value in figures.items()}
