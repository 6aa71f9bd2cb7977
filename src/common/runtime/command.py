"""What the programs of the command line have in common: how they begin, and how errors end them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from src.common.runtime import errors, limits, streams

# What a person can mend; all else is a traceback.
MENDABLE = (ValueError, KeyError, OSError, RuntimeError, ImportError, MemoryError, FloatingPointError)


def run(work: Callable[[], int | None], flags: Any = None, interrupted: str = "interrupted") -> int:
    """The exit code of a program: what `work()` returns (None: 0), 1 after an error, 130 after an interrupt.

    flags        FlagValues of the program; with their `traceback` an error is raised
    interrupted  what is told after an interrupt

    An error that a person can mend is one sentence on standard error. A reader of standard output that has seen enough,
    as `head` has, is no error.
    """
    streams.keep_open()
    try:
        if warning := limits.check_memory():
            streams.tell(f"warning: {warning}")
        code = work()
        sys.stdout.flush()
        return code or 0
    except BrokenPipeError:
        streams.drain()
        return 0
    except KeyboardInterrupt:
        streams.tell(interrupted)
        return 130
    except MENDABLE as error:
        if flags is not None and flags.is_parsed() and "traceback" in flags and flags["traceback"].value:
            raise
        streams.tell(f"error: {errors.in_words(error)}")
        return 1
