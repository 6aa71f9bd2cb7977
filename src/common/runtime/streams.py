"""Standard output and standard error that are closed, a broken pipe, or on a full disk.

What a program shows and also writes to a file may be lost: the run goes on, with a warning. What it only shows, such as
the text of a sample, may not: that is an error.
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

STREAMS = {0: ("stdin", "r"), 1: ("stdout", "w"), 2: ("stderr", "w")}


def keep_open() -> None:
    """Opens `os.devnull` for each standard stream that is closed; call it before anything opens a file.

    Else the next file that is opened gets the number of the stream, and libraries write their messages into it.
    """
    for number in STREAMS:
        try:
            os.fstat(number)
        except OSError:
            found = os.open(os.devnull, os.O_RDWR)
            if found != number:
                os.dup2(found, number)
                os.close(found)
    for name, mode in STREAMS.values():
        for each in (name, f"__{name}__"):
            if getattr(sys, each) is None:
                setattr(sys, each, open(os.devnull, mode))  # noqa: SIM115 - it stays open until the end


def say(text: str) -> None:
    """Prints to standard output. Raises OSError, in one sentence, where that cannot be written."""
    try:
        print(text, flush=True)
    except OSError as error:
        _drop(sys.stdout)
        raise OSError(
            f"standard output cannot be written ({error.strerror or error}): what was to be shown there is lost"
        ) from error


def tell(text: str) -> None:
    """Prints to standard error, where that can be written."""
    with contextlib.suppress(OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def drain() -> None:
    """Writes what is still buffered; where that fails, it is dropped, so that Python's end does not fail with it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            _drop(stream)


def _drop(stream: TextIO) -> None:
    """Sends what the stream holds, and all that comes, to `os.devnull`."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
        stream.flush()
