"""A thread that ends a run which hangs, after saying where: a launcher can start it again.

The loop reports its phase (`at`); each phase has a limit in seconds of monotonic time, and 0 is none. At half of
it all stacks go to standard error as a warning. When it is over they go there again, with one sentence about what
stalled, and the process ends with exit code 1, whatever its main thread does.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import jax
from absl import logging

START, DATA, STEP = "starting", "waiting for data", "in the train step"
SAVE, EVALUATE, TRACE = "saving", "evaluating", "writing a trace"
POLL = 5.0  # seconds between two looks, less for short allowances
VERDICTS = {
    START: "compiling, reading the checkpoint or the first step takes longer than watchdog.start allows",
    DATA: "the input stalled: look at the data's disk or store, and at the loader's threads below",
    STEP: "the device does not answer, or the steps between two log lines take longer than watchdog.seconds",
    SAVE: "the checkpoint is not written: look at the disk or store of the workdir",
    EVALUATE: "an evaluator takes longer than watchdog.evaluate allows",
    TRACE: "the trace is not written: look at the disk or store of the workdir, or trace fewer steps",
}


class Watchdog:
    """Watches from its making to `close`. `allowances` are seconds by place; a place without one is not watched."""

    def __init__(self, allowances: Mapping[str, float]):
        self.allowances = {place: seconds for place, seconds in allowances.items() if seconds > 0}
        self.place, self.since = START, time.monotonic()
        self._warned: float | None = None
        self._closed = threading.Event()
        self._poll = min([POLL, *(seconds / 8 for seconds in self.allowances.values())])
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self.allowances:
            self._thread.start()

    def at(self, place: str) -> None:
        """The run is now there, and moves."""
        self.place, self.since = place, time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._closed.set()
        if self._thread.is_alive():
            self._thread.join()
        faulthandler.cancel_dump_traceback_later()

    def _watch(self) -> None:
        while not self._closed.wait(self._poll):
            place, since = self.place, self.since
            seconds, allowed = time.monotonic() - since, self.allowances.get(place)
            if allowed is None:
                faulthandler.cancel_dump_traceback_later()
                continue
            # Python's own timer needs no lock of the interpreter, which a broken extension may hold for ever.
            faulthandler.dump_traceback_later(max(allowed - seconds, 0) + 10 * self._poll, exit=True)
            if seconds > allowed:
                self._end(place, seconds)
            elif seconds > allowed / 2 and self._warned != since:
                self._warned = since
                logging.warning("%s; at %.0f s it is ended. All stacks:", _told(place, seconds), allowed)
                _dump()

    def _end(self, place: str, seconds: float) -> None:
        hint = VERDICTS.get(place, "")
        if jax.process_count() > 1 and place != DATA:
            hint += "; or another process does not come: the log of the one that stalled first says why"
        logging.error("%s: %s. The run ends; the same command goes on from the last checkpoint.",
                      _told(place, seconds), hint)  # fmt: skip
        _dump()
        os._exit(1)  # an exception would wait for what hangs


def _told(place: str, seconds: float) -> str:
    return f"process {jax.process_index()} of {jax.process_count()} does not move since {seconds:.0f} s, {place}"


def _dump() -> None:
    with contextlib.suppress(Exception):
        logging.flush()
        sys.stderr.flush()
    faulthandler.dump_traceback(file=sys.__stderr__, all_threads=True)


_watchdog: Watchdog | None = None


@contextlib.contextmanager
def watching(seconds: float, start: float, save: float, evaluate: float) -> Iterator[None]:
    """Watches the block with these allowances (see `config.watchdog`); at the beginning it is `START`."""
    global _watchdog
    _watchdog = Watchdog({START: start, DATA: seconds, STEP: seconds, SAVE: save, EVALUATE: evaluate, TRACE: save})
    try:
        yield
    finally:
        watchdog, _watchdog = _watchdog, None
        watchdog.close()


def at(place: str) -> None:
    """Reports the phase of the run to the watchdog, if there is one."""
    if _watchdog is not None:
        _watchdog.at(place)


@contextlib.contextmanager
def during(place: str) -> Iterator[None]:
    """`at(place)` for a block; then the place before, from its beginning."""
    before = None if _watchdog is None else _watchdog.place
    at(place)
    try:
        yield
    finally:
        if before is not None:
            at(before)
