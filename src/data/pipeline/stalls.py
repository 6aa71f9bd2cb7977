"""Tells when the rows of a task are waited for unusually long."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from absl import logging


class Waits:
    """Says in the log what is waited for, after `patience` seconds and then each time the wait has doubled.

    `seconds` holds how long the caller waited for each task, in all. The thread that looks runs from the first
    `begin` to `close`.
    """

    def __init__(self, patience: float = 30.0):
        self.patience = patience
        self.seconds: dict[str, float] = {}
        self._now: tuple[str, Callable[[], str], float] | None = None
        self._closed: threading.Event | None = None

    def begin(self, task: str, describe: Callable[[], str]) -> None:
        """From now on rows of `task` are waited for; `describe` says which, when it is asked."""
        self._now = (task, describe, time.monotonic())
        if self._closed is None:
            self._closed = threading.Event()
            threading.Thread(target=self._look, args=(self._closed,), name="data waits", daemon=True).start()

    def end(self) -> None:
        """The rows are there (or will not come)."""
        task, _, since = self._now
        self._now = None
        self.seconds[task] = self.seconds.get(task, 0.0) + time.monotonic() - since

    def told(self) -> str:
        """What is waited for now, with the seconds since then: "task a waits for row 7 for 31 s"; "" for nothing."""
        now = self._now
        return f"task {now[0]} waits for {now[1]()} for {time.monotonic() - now[2]:.0f} s" if now else ""

    def close(self) -> None:
        """Ends the thread."""
        if self._closed is not None:
            self._closed.set()
            self._closed = None

    def _look(self, closed: threading.Event) -> None:
        seen, limit = None, self.patience
        while not closed.wait(min(1.0, self.patience / 4)):
            now = self._now
            if now is not seen:
                seen, limit = now, self.patience
            if now is not None and time.monotonic() - now[2] >= limit:
                limit *= 2
                logging.warning("%s", self.told())
