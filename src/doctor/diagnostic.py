"""Results of the checks: errors, warnings and notes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from absl import logging

from src.common.mesh.distributed import is_first

SEVERITIES = ("error", "warning", "note")


@dataclasses.dataclass(frozen=True)
class Diagnostic:
    """One sentence: problem, place, remedy.

    severity   error: the run stops before step 1 · warning: probably a mistake · note: for information
    """

    severity: str
    text: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.text}"


def error(text: str) -> Diagnostic:
    """A diagnostic that stops the run."""
    return Diagnostic("error", text)


def warning(text: str) -> Diagnostic:
    """A diagnostic of a probable mistake."""
    return Diagnostic("warning", text)


def note(text: str) -> Diagnostic:
    """A diagnostic for information."""
    return Diagnostic("note", text)


def errors(findings: Sequence[Diagnostic]) -> list[Diagnostic]:
    """The errors among them."""
    return [f for f in findings if f.severity == "error"]


def log_or_raise(findings: Sequence[Diagnostic]) -> None:
    """Logs warnings and notes. Raises ValueError with all findings when one of them is an error."""
    if errors(findings):
        ranked = sorted(findings, key=lambda f: SEVERITIES.index(f.severity))
        listing = "\n".join(f"  {finding}" for finding in ranked)
        raise ValueError(
            "the checks before the first step found errors: correct them, or set doctor.checks=False to train"
            f" anyway:\n{listing}"
        )
    for finding in findings if is_first() else ():
        logging.log(logging.WARNING if finding.severity == "warning" else logging.INFO, "doctor: %s", finding.text)
