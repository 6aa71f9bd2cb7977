"""Text on a terminal that cannot show all characters."""

from __future__ import annotations

import sys


def escape() -> None:
    """From here on a character that standard output or error cannot encode is written as an escape (`\\u72ac`), where
    Python would raise an error; so is a byte of a file's name that is no text."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # None where it is closed; other kinds in notebooks
            stream.reconfigure(errors="backslashreplace")
