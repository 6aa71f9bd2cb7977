"""Requests by signals: to stop (SIGTERM, Ctrl-C and the platform's notice before it takes the machine away), and to
trace the next steps (SIGUSR1, see `tracing.py`).

A training that is to stop finishes its step, saves, and ends with exit code 0; a second Ctrl-C ends it at once (130).
Where nothing would be lost (before the first step, during the last evaluation, with --mode=eval and sample) the first
request ends it. Several processes must stop at one step, whichever got the request. JAX's preemption service catches
SIGTERM for that and agrees on a step; Ctrl-C is passed on to it as SIGTERM.

The signals are read by a thread, so that they count while the main thread compiles or waits for a device.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable

from absl import logging

from src.common.runtime import streams

NOTE = "STOP_NOTE"  # the variable with a launcher's file, which distinguishes "stopped" from "finished"
TRACE = getattr(signal, "SIGUSR1", None)  # not on every system
TOLD = "asked to stop (%s): finishing this step, saving and leaving; Ctrl-C once more leaves at once"


class Stopped(Exception):
    """The run stopped on request; everything is saved."""


class Signals:
    """The signals of this process, from `start` to `close`; one at a time, in the main thread.

    `graceful` is whether a request lets the work finish its step. `shared` is whether other processes take part, in
    which case JAX's service has SIGTERM (see `distributed.start`). While `busy`, a request waits for the next `asked`.
    """

    def __init__(self, graceful: bool, shared: bool):
        self.graceful, self.shared = graceful, shared
        self.requested = self.agreed = False
        self.heard = self.traces = self._interrupts = self._asks = 0
        self.busy = False
        self.before: list[Callable[[], None]] = []
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        names = [signal.SIGINT] if shared and graceful else [signal.SIGINT, signal.SIGTERM]
        # A shell's background job ignores Ctrl-C, which is for the one in front.
        names = [name for name in names if signal.getsignal(name) is not signal.SIG_IGN]
        names += [TRACE] if graceful and TRACE else []
        self._before = {name: signal.signal(name, lambda *_: None) for name in names}
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()

    def asked(self) -> bool:
        """Whether to stop now. Every process must call it equally often, and all get the same answer."""
        if self.agreed or not self.shared:
            self.agreed = self.agreed or self.requested
            return self.agreed
        from jax.experimental import multihost_utils

        self._asks += 1
        self.agreed = self.graceful and multihost_utils.reached_preemption_sync_point(self._asks)
        if self.agreed and not self.requested:
            logging.info(TOLD, "SIGTERM, here or at another process")
        return self.agreed

    def close(self) -> None:
        """Gives the signals back."""
        signal.set_wakeup_fd(self._wakeup)
        for name, handler in self._before.items():
            signal.signal(name, handler)
        os.close(self._write)  # ends the thread

    def _listen(self) -> None:
        with open(self._read, "rb", buffering=0) as pipe:
            while heard := pipe.read(64):
                for number in heard:
                    self._hear(signal.Signals(number))
                    self.heard += 1

    def _hear(self, number: signal.Signals) -> None:
        if number not in self._before:
            return
        if number == TRACE:
            logging.info("asked for a trace (%s): it begins with the next step", number.name)
            self.traces += 1
            return
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1 or not self.graceful:
            _leave(f"ended by {number.name}; what was saved before is sound", 128 + number)
        if not self.busy and not self.shared:  # of several processes one alone may not leave
            for call in self.before:
                with contextlib.suppress(Exception):
                    call()
            note("with nothing to save")
            _leave(f"asked to stop ({number.name}): there is nothing to save now; the same command goes on", 0)
        if not self.requested:
            logging.info(TOLD, number.name)
        self.requested = True
        if self.shared and number == signal.SIGINT:
            os.kill(os.getpid(), signal.SIGTERM)  # to JAX's service, which notifies the others


_watch: Signals | None = None


def start(graceful: bool, shared: bool) -> None:
    """Watches the signals of this process (see `Signals`); after `distributed.start`, in the main thread."""
    global _watch
    close()
    _watch = Signals(graceful, shared)


def close() -> None:
    """Stops watching."""
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.close()


def asked() -> bool:
    """Whether to stop now, the same on every process; every process must call it equally often. False before `start`.

    With several processes the answer takes about a second, and comes at the step after the furthest of them.
    """
    return _watch is not None and _watch.asked()


def check() -> None:
    """Raises Stopped when `asked`."""
    if asked():
        raise Stopped


def trace_asked() -> bool:
    """Whether a trace of the next steps was asked for since the last call."""
    if _watch is None or not _watch.traces:
        return False
    _watch.traces = 0
    return True


def busy(is_busy: bool = True) -> None:
    """Whether something would be lost if the process ended now. At the start it is not busy."""
    if _watch is not None:
        _watch.busy = is_busy


def before_leaving(call: Callable[[], None]) -> None:
    """Makes `call` before a request ends the process while it is not busy."""
    if _watch is not None:
        _watch.before.append(call)


def note(text: str) -> None:
    """Writes the launcher's file: the run is not finished, which exit code 0 alone would mean."""
    if path := os.environ.get(NOTE):
        with contextlib.suppress(OSError), open(path, "w") as file:
            file.write(text + "\n")


def _leave(text: str, code: int) -> None:
    streams.tell(text)
    streams.drain()
    os._exit(code)
