"""Rows that cannot be used: what is wrong with each, how many there were, and when there are too many.

A row that a source refuses (`BadRow`) keeps its place in the batch and counts nothing there. This is the report about
it; nothing of it enters the state of a run. `<workdir>/skipped.jsonl` gets one line for each bad row that was met (not
one for each epoch), from the first process; process i > 0 writes `skipped-i.jsonl`.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import logging
from etils import epath

from src.common.files.store import is_remote, write_whole
from src.common.mesh.distributed import gather_texts
from src.data import flaws

FLAW_BYTES = 384  # of what a worker may tell about a row
SHOWN = 10  # rows that a message lists
MOST = 100_000  # rows in the file; the others are only counted


class BadRow(Exception):
    """Raised by `Source.read` for a row that cannot be used.

    reason    a few words, the same for all rows that fail alike: they are counted by it
    where     the file and the line or record
    detail    what exactly was found there
    rest      the arrays of what can be used of the row all the same (some examples of a packed row); None: nothing
    """

    def __init__(
        self, reason: str, where: object = "", detail: object = "", rest: Mapping[str, np.ndarray] | None = None
    ):
        self.reason, self.where, self.detail = (" ".join(str(part).split()) for part in (reason, where, detail))
        told = f"{self.where}: {self.reason}" if self.where else self.reason
        super().__init__(f"{told} ({self.detail})" if self.detail else told)
        self.rest = rest

    def pack(self) -> np.ndarray:
        """As uint8 `[FLAW_BYTES]`, which travels with the batch; what is too long is cut."""
        text = f"{self.reason[:80]}\n{self.where[-100:]}\n{self.detail}"
        data = text.encode(errors="replace")[: FLAW_BYTES - 1].ljust(FLAW_BYTES - 1, b"\0")
        return np.frombuffer(data + (b"\0" if self.rest is None else PARTLY), np.uint8)

    @classmethod
    def unpack(cls, data: np.ndarray) -> BadRow:
        """What `pack` gave."""
        return cls(*data[:-1].tobytes().rstrip(b"\0").decode(errors="ignore").split("\n", 2))


SOUND = np.zeros(FLAW_BYTES, np.uint8)  # instead of a packed flaw
PARTLY = b"\1"  # ends a packed flaw of a row whose rest is used


def usable(flaws: np.ndarray) -> np.ndarray:
    """Which rows `[B]` can be used, at least in part; `flaws` is `[B, FLAW_BYTES]`."""
    return ~flaws.any(axis=1) | (flaws[:, -1] == PARTLY[0])


class TooManyBadRowsError(ValueError):
    """More rows are bad than the config allows; the message lists the first of them."""


class Ledger:
    """Counts the bad rows of each task, and writes down which they are.

    folder         of `skipped.jsonl`; with None nothing is written
    share, least   too many are more than `share` of the rows that a task read, and at least `least`

    A row that is met again in each epoch counts each time. The counts are part of a run's position (`get_state`), so
    that a resumed run tells the same numbers.
    """

    def __init__(self, folder: Any = None, *, share: float = 0.05, least: int = 10):
        name = f"skipped-{jax.process_index()}.jsonl" if jax.process_index() else "skipped.jsonl"
        self.path = None if folder is None else epath.Path(folder) / name
        self.share, self.least = share, least
        self.read: collections.Counter[str] = collections.Counter()
        self.skipped: collections.Counter[str] = collections.Counter()
        self._first: dict[str, dict[str, None]] = collections.defaultdict(dict)  # where, reason, detail as JSON
        self._lines: dict[tuple[str, int], str] | None = None  # of the file, by task and row
        self._unsaved: list[str] = []
        self._before = {"read": collections.Counter(), "skipped": collections.Counter()}  # of the run's earlier starts
        self._told: collections.Counter[str] = collections.Counter()
        self._warned = False

    def add(self, task: str, rows: int, bad: Sequence[tuple[int, BadRow]] = ()) -> None:
        """Notes that a task read `rows` rows, of which those of `bad` (row of the source, what is wrong) are bad."""
        self.read[task] += rows
        for row, flaw in bad:
            self.skipped[task] += 1
            if len(self._first[task]) < SHOWN:
                self._first[task][json.dumps([flaw.where, flaw.reason, flaw.detail])] = None
            if self.path is None:
                continue
            lines = self._load()
            if (task, row) not in lines and len(lines) < MOST:
                told = {"task": task, "row": int(row), "reason": flaw.reason, "where": flaw.where}
                lines[task, row] = json.dumps(told | {"detail": flaw.detail})
                self._unsaved.append(lines[task, row])

    def check(self) -> None:
        """Raises TooManyBadRowsError in a run of one process; several must stop together, see `settle`."""
        if self.skipped and jax.process_count() == 1:
            self._judge(self._before["read"] + self.read, self._before["skipped"] + self.skipped, self._first)

    def settle(self, shard: int = 0) -> dict[str, float]:
        """`data/skipped/<task>`: bad rows since the last call, over all processes, of the tasks that had some.

        Every process calls it at the same step. `shard` says which share of the rows this process reads; of processes
        with the same share one is counted. Raises TooManyBadRowsError, on all of them.
        """
        self.save()
        read, skipped, first = self._totals(shard)
        self._judge(read, skipped, first)
        new, self._told = skipped - self._told, skipped
        for task, count in new.items():
            where = f"all are in {self.path}" if self.path else f"first {_told(first[task], 1)}"
            logging.warning("task %s: %d bad rows were skipped since the last line; %s", task, count, where)
        return {f"data/skipped/{task}": float(count) for task, count in new.items()}

    def get_state(self, shard: int = 0) -> dict[str, dict[str, int]]:
        """The counts of all processes, which call it together, and what of them `settle` has told, as JSON."""
        read, skipped, _ = self._totals(shard)
        return {"read": dict(read), "skipped": dict(skipped), "told": dict(self._told)}

    def set_state(self, state: Mapping[str, Mapping[str, int]]) -> None:
        """Goes on where `get_state` was called."""
        self.read.clear()
        self.skipped.clear()
        self._before = {name: collections.Counter(state[name]) for name in ("read", "skipped")}
        self._told = collections.Counter(state["told"])

    def _totals(self, shard: int) -> tuple[collections.Counter[str], collections.Counter[str], Mapping[str, Any]]:
        """Rows read, rows skipped and the first of these, by task, of all processes and starts of the run."""
        mine = {
            "shard": shard,
            "read": self.read,
            "skipped": self.skipped,
            "first": {k: [*v] for k, v in self._first.items()},
        }
        read, skipped, first = *map(collections.Counter, self._before.values()), collections.defaultdict(dict)
        shares = {each["shard"]: each for each in map(json.loads, gather_texts(json.dumps(mine)))}
        for each in shares.values():
            read.update(each["read"])
            skipped.update(each["skipped"])
            for task, found in each["first"].items():
                first[task] |= dict.fromkeys(found)
        return read, skipped, first

    def summary(self) -> list[str]:
        """Lines about the rows in the file: how many are bad in each of the source's files."""
        return flaws.summary(map(json.loads, self._load().values())) if self.path else []

    def save(self) -> None:
        """Writes what was noted; a failure is a warning, and the next call tries again."""
        if not self._unsaved:
            return
        try:
            if is_remote(self.path):  # nothing can be appended in a store
                write_whole(self.path, "".join(f"{line}\n" for line in self._load().values()).encode())
            else:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write("".join(f"{line}\n" for line in self._unsaved))
            self._unsaved.clear()
        except Exception as error:  # a store's client has its own kinds
            if not self._warned:
                logging.warning("The list of bad rows cannot be written to %s: %s", self.path, error)
            self._warned = True

    def _load(self) -> dict[tuple[str, int], str]:
        """The lines of earlier starts; half a line of one that was killed is completed by a line end."""
        if self._lines is None:
            self._lines, text = {}, ""
            if self.path.exists():
                text = self.path.read_bytes().decode(errors="replace")
            for line in text.splitlines():
                try:
                    told = json.loads(line)
                    self._lines[told["task"], told["row"]] = line
                except (ValueError, KeyError, TypeError):
                    continue
            if text and not text.endswith("\n"):
                self._unsaved.append("")
        return self._lines

    def _judge(self, read: Mapping[str, int], skipped: Mapping[str, int], first: Mapping[str, Any]) -> None:
        for task, count in skipped.items():
            if count >= self.least and count > self.share * read[task]:
                self.save()
                where = f"; the whole list is in {self.path}" if self.path else ""
                raise TooManyBadRowsError(
                    f"task {task}: {count} of the {read[task]} rows read so far are bad, more than"
                    f" data.max_bad.share={self.share:g} allows: {_told(first[task])}{where}: mend the data,"
                    " or raise data.max_bad.share"
                )


def _told(first: Mapping[str, Any], shown: int = SHOWN) -> str:
    """The first of some flaws, as `Ledger` keeps them, and how many of these are left out."""
    more = f" and {len(first) - shown} more" if len(first) > shown else ""
    return flaws.grouped(tuple(json.loads(flaw)) for flaw in [*first][:shown]) + more
