"""Text on a terminal that cannot show all characters."""

from __future__ import annotations

import sys


def escape() -> None:
    """From here on a character that standard output or error cannot encode is written as an escape (`\\xfc`, `\\u72ac`),
    where Python would raise an error; one that has no encoding at all, as in the name of a file, is too."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it is closed; other kinds in notebooks
            stream.reconfigure(errors="backslashreplace")
