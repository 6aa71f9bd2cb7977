"""Where the time of a run goes, over all its restarts: the file `goodput.jsonl` of a workdir.

A process keeps an account (`Goodput`): at each moment its main thread does one thing of `PARTS`, so that the parts add
up to the time since its start. It appends the account to the file every `EVERY` seconds, at each save and at its end:

    {"step": 40, "time": …, "attempt": 1.0, "from": 20.0, "start": 5.1, "compile": 3.2, "data": 0.4, …}

`attempt` counts the processes of the run from 0, `from` is the step that it went on from. The file is never rewound:
steps behind the checkpoint from which a later process went on were done again. What the account gained after that
checkpoint is `lost`. What a killed process did after its last record is not known, and is not counted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common.files.paths import bounded_lines, check_plain
from src.common.runtime.errors import brief
from src.common.runtime.writers import JsonLinesWriter

FILE = "goodput.jsonl"
EVERY = 10.0  # seconds between two records
BYTES = 1 << 30  # of the file, at most
MOST = 100_000  # processes of a run
# start: imports, building, reading the checkpoint, checks. compile: waiting for programs. data: waiting for a batch.
# save, evaluate: the loop waits for them. other: traces, the end.
PARTS = ("start", "compile", "data", "steps", "save", "evaluate", "other")
AGAIN = ("data", "steps", "save", "evaluate", "other")  # of them, what is lost with a step that is done again
LOST = "lost"
NAMES = ("goodput", *(f"goodput/{part}" for part in (*PARTS, LOST)), "goodput/lost_steps", "goodput/restarts")
COMPILING = ("/jax/core/compile/jaxpr_to_mlir_module_duration", "/jax/core/compile/backend_compile_duration")


@dataclasses.dataclass(frozen=True)
class Record:
    """A line of the file. `time` is that of the clock, seconds since 1970."""

    step: int
    time: float
    attempt: int
    begun: int
    seconds: Mapping[str, float]

    @property
    def total(self) -> float:
        """Seconds since the start of the process."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Attempt:
    """A process of a run, by its first and last record: `seconds` by part, without those that are `lost` with the
    `lost_steps`."""

    first: Record
    last: Record
    seconds: Mapping[str, float]
    lost: float
    lost_steps: int


def read_records(path: str | os.PathLike[str]) -> Iterator[Record]:
    """The sound records of a file, in its order; other lines are passed over. None where there is no file.

    Raises OSError or ValueError, in one sentence, for what is no plain file, or too long.
    """
    where = epath.Path(path)
    check_plain(path)
    if not where.exists():
        return
    if (size := where.stat().length) > BYTES:
        raise ValueError(f"{where} has {size:,} bytes, which no such file needs: move it away")
    with where.open("rb") as file:
        for line in bounded_lines(file):
            if (record := _parse(line)) is not None:
                yield record


def _parse(line: bytes) -> Record | None:
    try:
        found = json.loads(line)
        seconds = {part: float(found[part]) for part in PARTS}
        counts = [int(found[name]) for name in ("step", "attempt", "from")]
        at = float(found["time"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None
    sound = all(math.isfinite(x) and x >= 0 for x in (*seconds.values(), at))
    sound = sound and all(0 <= x < 2**53 for x in counts) and counts[1] < MOST
    return Record(counts[0], at, counts[1], counts[2], seconds) if sound else None


def read_attempts(path: str | os.PathLike[str], then: int | None = None) -> list[Attempt]:
    """The processes of a run, in order. `then` is the step that a process that has no record yet goes on from.

    Reads the file twice, and keeps two records for each process in memory. Raises as `read_records`.
    """
    begun: dict[int, int] = {}
    for record in read_records(path):
        begun[record.attempt] = record.begun
    again: dict[int, float] = {}  # by attempt: the smallest step that a later one went on from
    least = math.inf if then is None else float(then)
    for attempt in sorted(begun, reverse=True):
        again[attempt], least = least, min(least, float(begun[attempt]))
    first: dict[int, Record] = {}
    last: dict[int, Record] = {}
    kept: dict[int, Record] = {}
    for record in read_records(path):
        first.setdefault(record.attempt, record)
        last[record.attempt] = record
        if record.step <= again[record.attempt]:
            kept[record.attempt] = record
    return [_attempt(first[n], last[n], kept.get(n), again[n]) for n in sorted(last)]


def _attempt(first: Record, last: Record, kept: Record | None, again: float) -> Attempt:
    """`kept`: the last record of a step that no later process did again, None where there is none."""
    if last.step <= again:
        return Attempt(first, last, last.seconds, 0.0, 0)
    seconds = dict(last.seconds)
    for part in AGAIN:
        seconds[part] = min(kept.seconds[part] if kept else 0.0, last.seconds[part])
    steps = last.step - max(int(again), last.begun)
    return Attempt(first, last, seconds, last.total - sum(seconds.values()), steps)


def summary(attempts: list[Attempt]) -> dict[str, float]:
    """The sums over all processes, by `NAMES`: seconds, and `goodput`, the share of the steps that were not lost."""
    seconds = {part: sum(each.seconds[part] for each in attempts) for part in PARTS}
    lost = sum(each.lost for each in attempts)
    total = sum(seconds.values()) + lost
    told = {"goodput": seconds["steps"] / total if total else 0.0}
    told |= {f"goodput/{part}": value for part, value in (seconds | {LOST: lost}).items()}
    told["goodput/lost_steps"] = float(sum(each.lost_steps for each in attempts))
    return told | {"goodput/restarts": float(max(len(attempts) - 1, 0))}


class Goodput:
    """The account of this process, and with a `path` its records; `started` is `time.monotonic()` at its start."""

    def __init__(self, path: str | os.PathLike[str] | None = None, started: float | None = None):
        self.path, self.part = path, "start"
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._since = time.monotonic() if started is None else started
        self._writer = JsonLinesWriter(path) if path is not None else None
        self._earlier: list[Attempt] | None = None  # once it has begun
        self._number, self._begun, self._step, self._due = -1, 0, 0, 0.0
        self._thread = threading.get_ident()

    def at(self, part: str) -> None:
        """From now on the time is that of `part`."""
        now = time.monotonic()
        self.seconds[self.part] += now - self._since
        self.part, self._since = part, now

    @contextlib.contextmanager
    def during(self, part: str) -> Iterator[None]:
        """`at(part)` for a block; then the part before."""
        before = self.part
        self.at(part)
        try:
            yield
        finally:
            self.at(before)

    def begin(self, step: int) -> None:
        """Reads what earlier processes left, goes on from `step`, and writes the first record; again with another step
        where the newest checkpoint was not the one that was read."""
        if self._writer is None:
            return
        try:
            self._earlier = read_attempts(self.path, step)
        except Exception as error:  # a store's client has its own kinds
            logging.warning("the time of earlier processes is not known: %s", brief(error))
            self._earlier = []
        if self._number < 0:
            self._number = max((each.last.attempt + 1 for each in self._earlier), default=0)
            jax.monitoring.register_event_duration_secs_listener(self._compiled)
        self._earlier = [each for each in self._earlier if each.last.attempt != self._number]
        self._begun = step
        self.record(step)

    def beat(self, step: int) -> None:
        """`record`, if the last one is long ago."""
        if time.monotonic() >= self._due:
            self.record(step)

    def record(self, step: int) -> None:
        """Appends the account after `step` steps."""
        if self._earlier is None:
            return
        self._step, self._due = step, time.monotonic() + EVERY
        self.at(self.part)
        about = {"attempt": self._number, "from": self._begun}
        told = {part: round(max(value, 0.0), 3) for part, value in self.seconds.items()}
        self._writer.write_scalars(step, about | told)

    def settle(self) -> None:
        """As `History.settle`."""
        if self._writer is not None:
            self._writer.settle()

    def scalars(self) -> dict[str, float]:
        """`summary` of the run up to now, {} where nothing is recorded."""
        if self._earlier is None:
            return {}
        self.at(self.part)
        now = Record(self._step, time.time(), self._number, self._begun, self.seconds)
        return summary([*self._earlier, Attempt(now, now, self.seconds, 0.0, 0)])

    def close(self) -> None:
        """Ends the account."""
        if self._number >= 0:
            jax.monitoring.unregister_event_duration_listener(self._compiled)
        if self._writer is not None:
            self._writer.close()

    def _compiled(self, event: str, seconds: float, **_: Any) -> None:
        """Programs that this thread compiled while it did something else."""
        if event in COMPILING and threading.get_ident() == self._thread and self.part != "compile":
            self.seconds[self.part] -= seconds
            self.seconds["compile"] += seconds
