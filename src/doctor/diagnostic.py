"""What a check finds, and what becomes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import logging

from src.common.mesh.distributed import is_first

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Finding:
    """One sentence: what, where, what to do.

    severity   error: the run would be wasted, it stops before step 1 · warning: worth a look · note: good to know
    """

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def error(text: str) -> Finding:
    """A finding that stops the run."""
    return Finding("error", text)


def warning(text: str) -> Finding:
    """A finding that is worth a look."""
    return Finding("warning", text)


def note(text: str) -> Finding:
    """A finding that is good to know."""
    return Finding("note", text)


def errors(findings: Sequence[Finding]) -> list[Finding]:
    """Those that stop a run."""
    return [f for f in findings if f.severity == "error"]


def settle(findings: Sequence[Finding]) -> None:
    """Logs warnings and notes. Raises ValueError with the list of all findings when one of them is an error."""
    if errors(findings):
        ranked = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
        told = "\n".join(f"  {finding}" for finding in ranked)
        raise ValueError(
            "the checks before the first step found what would spoil the run; mend it, or set doctor.checks=False to"
            f" train all the same:\n{told}"
        )
    for finding in findings if is_first() else ():
        logging.log(logging.WARNING if finding.severity == "warning" else logging.INFO, "doctor: %s", finding.text)
