"""Background work in threads that do not delay the end of the program."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

from src.common.runtime import streams

_threads: list[threading.Thread] = []


def begin(work: Callable[[], Any], name: str) -> Future:
    """The work in a thread of that name; the threads of a pool would be waited for at the end of the program."""
    future: Future = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    thread = threading.Thread(target=run, name=name, daemon=True)
    _threads.append(thread)
    thread.start()
    return future


def leave(code: int) -> None:
    """Ends the program, after everything of worth was written and closed.

    While background work runs, Python's own shutdown is skipped: a compiler that comes back to a Python which is
    no more aborts the process, whatever the exit code was.
    """
    streams.drain()
    if not any(thread.is_alive() for thread in _threads):
        sys.exit(code)
    with contextlib.suppress(Exception):
        logging.shutdown()
    os._exit(code)
