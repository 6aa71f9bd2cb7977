"""What several programs of a step need together: the train step, and before it the frozen encoders' own program.

They run one after the other on the same devices, so their times add up; of their memory what stays is in both counts,
and what is theirs alone never meets.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def programs(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The parts of a report that are programs, the train step first."""
    return [report, *([report["encoding"]] if "encoding" in report else [])]


def fits(report: Mapping[str, Any]) -> bool:
    """Whether all programs fit."""
    return all(part["memory"]["fits"] for part in programs(report))


def peak(report: Mapping[str, Any]) -> int:
    """Bytes of a device while the largest program runs."""
    return max(part["memory"]["total"] for part in programs(report))


def seconds(report: Mapping[str, Any], case: str) -> float | None:
    """Least seconds of a step, in the `best` or `worst` case; None where a program did not compile."""
    times = [part["roofline"][case] for part in programs(report) if "roofline" in part]
    return sum(times) if len(times) == len(programs(report)) else None
