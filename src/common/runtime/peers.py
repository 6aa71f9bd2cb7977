"""Processes of a run that ended or do not answer: which they are, and what to do.

JAX's service aborts every process, with a stack trace of C++, when it misses another one for JAX_HEARTBEAT_TIMEOUT
seconds. A sentence comes before; where process 0 dies, which runs the service, JAX is faster, and it comes behind
(`abort_note.py`).
"""

from __future__ import annotations

import os
import re
import threading
import time
from typing import Any

import jax

from src.common.runtime import abort_note, stopping, streams

LINKS = re.compile(
    r"gloo|connection (closed|reset|refused)|socket closed|heartbeat|unhealthy|broken pipe", re.IGNORECASE
)
SHARE = 0.5  # of the time after which JAX aborts
ANSWER = 3.0  # seconds within which the processes that still work meet the same error
LOST, ALIVE, DEAD = "lost_a_process", "signs_of_life", "dead_processes"


def is_lost(error: BaseException) -> bool:
    """Whether a runtime's error means that another process is not there any more."""
    shared = jax.distributed.is_initialized() and type(error).__module__.startswith(("jax", "xla"))
    return shared and LINKS.search(str(error)) is not None


def told(reason: str, missing: list[int]) -> str:
    """One sentence about the processes that are `missing`; an empty list is an unknown one."""
    names = " and ".join(f"process {number}" for number in missing) or "another process"
    short = " ".join(reason.split())[:120]
    return (
        f"{names} of {_state().num_processes} ended or does not answer ({short}): its log says why; when that is"
        " mended, start all processes again with the same command, which goes on from the last checkpoint"
    )


def missing() -> list[int]:
    """Processes that do not say, within `ANSWER` seconds, that they met the same error; [0] where process 0, which
    answers for all, is not there."""
    state = _state()
    try:
        state.client.key_value_set(f"{LOST}/{state.process_id}", "1", allow_overwrite=True)
        time.sleep(ANSWER)
        found = {int(key.rpartition("/")[2]) for key, _ in state.client.key_value_dir_get(f"{LOST}/")}
    except Exception:  # of its client, which has its own kinds
        return [0] if state.process_id else []
    return sorted(set(range(state.num_processes)) - found)


class PeerWatch:
    """Signs of life through JAX's service: every process gives them, process 0 looks for those of the others.

    seconds   after so long without a sign every process tells which one is missing; to end them is left to JAX, whose
              own signs do not depend on Python
    """

    def __init__(self, seconds: float):
        self.seconds, self.beat = seconds, min(2.0, seconds / 8)
        self._state, self._over = _state(), threading.Event()
        self._seen: dict[str, tuple[str, float]] = {}  # sign and time of its change, by key
        self._told: list[int] = []
        threading.Thread(target=self._run, name="peers", daemon=True).start()

    def close(self) -> None:
        """Stops; the others must not watch any more."""
        self._over.set()

    def _run(self) -> None:
        count = 0
        while not self._over.wait(self.beat):
            count += 1
            try:
                dead = self._look(count)
            except Exception:  # process 0 is gone, or the run is over: JAX ends this process
                continue
            if dead and dead != self._told and not self._over.is_set():
                streams.tell(f"error: {told(f'no sign of life for {self.seconds:.0f} s', dead)}")
                abort_note.close()  # what comes is told
            self._told = dead

    def _look(self, count: int) -> list[int]:
        """Gives a sign; the processes that give none."""
        client, index = self._state.client, self._state.process_id
        client.key_value_set(f"{ALIVE}/{index}", str(count), allow_overwrite=True)
        if index:
            return [int(number) for _, dead in client.key_value_dir_get(f"{DEAD}/") for number in dead.split()]
        now = time.monotonic()
        for key, sign in client.key_value_dir_get(f"{ALIVE}/"):
            if self._seen.get(key, ("", 0.0))[0] != sign:
                self._seen[key] = sign, now
        late = [key for key, (_, since) in self._seen.items() if now - since > self.seconds]
        dead = sorted(int(key.rpartition("/")[2]) for key in late)
        if dead != self._told:
            client.key_value_set(f"{DEAD}/all", " ".join(map(str, dead)), allow_overwrite=True)
        return dead


_watch: PeerWatch | None = None


def start() -> None:
    """Watches the processes of this run, if there are several; after `distributed.start`."""
    global _watch
    if not jax.distributed.is_initialized():
        return
    _watch = PeerWatch(SHARE * int(os.environ.get("JAX_HEARTBEAT_TIMEOUT") or 100))
    if _state().process_id and stopping.NOTE not in os.environ:  # whose launcher says it
        abort_note.start(_state().coordinator_address, _state().process_id, _state().num_processes)


def close() -> None:
    """Stops watching; after the others are known to be done."""
    global _watch
    watch, _watch = _watch, None
    if watch is not None:
        watch.close()


def _state() -> Any:
    from jax._src.distributed import global_state  # JAX has no public way to its service

    return global_state
