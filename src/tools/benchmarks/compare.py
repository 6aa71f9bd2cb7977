"""Figures of the bench against those of before: old, new, their ratio, and what is worse by more than a tolerance."""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from src.common.files.paths import shown
from src.common.files.strict_json import read_json
from src.tools.benchmarks.accelerator import REASONS

WORSE = 2  # exit code
HIGHER = re.compile(r"(_per_second|^mfu|share|slower_than_ours|times_what_the_step_takes|^equal)")  # is better
LOWER = re.compile(r"((^|_)seconds|memory|bytes|difference|^ours$)")
NOT_OURS = re.compile(  # of the machine, of a peer, and what depends on programs that were kept
    r"^(peak/|step/matrix products/|peer/(?!.*(slower_than_ours|/ours)))|peak_flops_per_second|first_call_seconds"
)
ABOUT = ("machine", "chip", "tiny", "config", "version", "jax", "python")  # of what figures are from


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Lines to print; `worse`: the names of figures that are worse, or that could not be had again."""

    lines: list[str]
    worse: list[str]


def read_figures(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The figures that `bench --json` wrote. Raises FileNotFoundError, OSError or, in one sentence, ValueError."""
    found = read_json(path, what="file of figures", finite=False)
    groups = found.values() if isinstance(found, dict) else ()
    if not groups or not all(isinstance(each, dict) and isinstance(each.get("where"), dict) for each in groups):
        raise ValueError(
            f"the file {shown(os.fspath(path))} has no figures of the bench: give one that bench --json wrote"
        )
    return found


def compare(old: Mapping[str, Any], new: Mapping[str, Any], worse: float, number: Callable[[Any], str]) -> Comparison:
    """Figures of two runs by name. Those of other machines, configs or versions are compared and told.

    worse   share by which a time or a size may grow, or a rate fall
    number  how a figure is written

    Counts, sizes and what is measured of the machine or of a peer itself are neither better nor worse.
    """
    before, after = dict(_figures(old)), dict(_figures(new))
    lines, bad = [f"note: {each}" for each in _differences(old, new)], []
    width = max(map(len, [*before, *after]), default=0)
    for name, was in before.items():
        if name not in after:
            reason = _reason(new, name)
            if reason and name.split("/")[0] in new:
                bad.append(f"{name} ({reason})")
            lines.append(f"{name:<{width}}  {number(was):>14}  {'-':>14}  {reason or 'not in the new figures'}")
            continue
        now, sign = after[name], direction(name)
        ratio = now / was if was else float(now == was)
        far = sign and (ratio - 1) * sign < -worse
        if far:
            bad.append(f"{name} ({number(was)} → {number(now)})")
        if sign or ratio != 1:
            verdict = "worse" if far else "better" if sign and (ratio - 1) * sign > worse else ""
            lines.append(f"{name:<{width}}  {number(was):>14}  {number(now):>14}  {ratio:8.3f}  {verdict}".rstrip())
    lines += [f"{n:<{width}}  {'-':>14}  {number(v):>14}  new" for n, v in after.items() if n not in before]
    return Comparison(lines, bad)


def direction(name: str) -> int:
    """1 where more is better, -1 where less is, 0 where neither is; `name` is a path."""
    if NOT_OURS.search(name):
        return 0
    for part in reversed(name.split("/")):
        if HIGHER.search(part):
            return 1
        if LOWER.search(part):
            return -1
    return 0


def _figures(group: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by path; of a spread the median."""
    for name, value in group.items():
        if name == "where" and isinstance(value, Mapping):
            continue
        here = f"{path}/{name}" if path else name
        if isinstance(value, Mapping) and "median" in value:
            yield here, float(value["median"])
        elif isinstance(value, Mapping):
            yield from _figures(value, here)
        elif isinstance(value, bool | int | float):
            yield here, float(value)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Of what the two are from: what differs, by the words of `ABOUT`."""
    was, now = (next(iter(figures.values()))["where"] for figures in (old, new))
    return [
        f"the old figures are of another {key}: {was.get(key, 'unknown')}, not {now.get(key, 'unknown')}"
        for key in ABOUT
        if was.get(key) != now.get(key)
    ]


def _reason(figures: Mapping[str, Any], name: str) -> str:
    """Why figures have no such one, where they say so."""
    here: Any = figures
    for part in name.split("/"):
        if not isinstance(here, Mapping):
            return ""
        for place in (here, here.get("all"), here.get("the rest")):
            if isinstance(place, Mapping):
                found = [f"{key.replace('_', ' ')}: {place[key]}" for key in REASONS if key in place]
                if found:
                    return found[0]
        here = here.get(part)
    return ""
