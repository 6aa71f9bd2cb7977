"""Rows that cannot be used: what is wrong with each, how many there were, and when there are too many.

A row that cannot be used (`BadRow`) keeps its place in the batch and counts nothing there. This is the report about
it; nothing of it enters the state of a run. `<workdir>/skipped.jsonl` gets one line for each bad row that was met (not
one for each epoch), from the first process; process i > 0 writes `skipped-i.jsonl`.
"""

from __future__ import annotations

import collections
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common.files.paths import check_plain, read_bounded
from src.common.files.store import is_remote, write_whole
from src.common.mesh.distributed import gather_texts
from src.common.tree import listed
from src.data.example import BadRow

SHOWN = 10  # rows that a message lists
MOST = 100_000  # rows in the file; the others are only counted
BYTES = 256 << 20  # of the file, at most
FILES = 10  # files that a summary names
# "train.jsonl line 3 turns 1 to 2", "00001.arrayrecord record 7", "a.tar fox.jpg"; else the place is a file itself
PLACE = re.compile(r"(.+) ((?:line|element|record) \d+(?: [^/]*)?)|(.+?\.tar) (.+)")
Told = tuple[str, str, str]  # where, reason and detail of a `BadRow`


class TooManyBadRowsError(ValueError):
    """More rows are bad than the config allows; the message lists the first of them."""


class Ledger:
    """Counts the bad rows of each task, and writes down which they are.

    folder         of `skipped.jsonl`; with None nothing is written
    share, least   too many are more than `share` of the rows that a task read, and at least `least`

    A row that is met again in each epoch counts each time. The counts are part of a run's position (`get_state`), so
    that a resumed run tells the same numbers.
    """

    def __init__(self, folder: Any = None, *, share: float | int = 0.05, least: int = 10):
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

    def first(self, task: str) -> str:
        """The first bad rows of a task with their reasons, "" where there were none."""
        return _told(self._first[task]) if self._first[task] else ""

    def summary(self) -> list[str]:
        """Lines about the rows in the file: how many are bad in each of the source's files."""
        return summary(map(json.loads, self._load().values())) if self.path else []

    def save(self) -> None:
        """Writes what was noted; a failure is a warning, and the next call tries again."""
        if not self._unsaved:
            return
        try:
            if is_remote(self.path):  # nothing can be appended in a store
                write_whole(self.path, "".join(f"{line}\n" for line in self._load().values()).encode())
            else:
                check_plain(self.path)
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
            try:
                text = read_bounded(self.path, BYTES, "list of bad rows").decode(errors="replace")
            except FileNotFoundError:
                pass
            except (ValueError, OSError) as error:
                logging.warning("%s; the bad rows of earlier starts are not known", error)
            for line in text.splitlines():
                try:
                    told = json.loads(line)
                    self._lines[told["task"], told["row"]] = line
                except (ValueError, KeyError, TypeError, RecursionError):
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
    return grouped(tuple(json.loads(flaw)) for flaw in [*first][:shown]) + more


def parted(where: str) -> tuple[str, str]:
    """The file of a place and what it is in it; ("", where) for a place that is a file itself."""
    found = PLACE.fullmatch(where)
    return ("", where) if found is None else (found[1] or found[3], found[2] or found[4])


def grouped(flaws: Iterable[Told]) -> str:
    """The flaws as a list: of each file what is wrong, and of this the places; equal details are told once."""
    files: dict[str, dict[str, list[tuple[str, str]]]] = {}
    for where, reason, detail in flaws:
        file, place = parted(where)
        files.setdefault(file, {}).setdefault(reason, []).append((place, detail))
    return "; ".join(
        f"{file}: {kinds}" if file else kinds
        for file, reasons in files.items()
        for kinds in ["; ".join(_places(reason, found) for reason, found in reasons.items())]
    )


def summary(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """A line for each file with bad rows, those with most first: how many they are, and how many of each reason.

    lines   those of `skipped.jsonl`, read; places that are files themselves are one line for each reason
    """
    counts: dict[str, collections.Counter[str]] = {}
    for line in lines:
        file, _ = parted(str(line.get("where")))
        counts.setdefault(file, collections.Counter())[str(line.get("reason"))] += 1
    single = counts.pop("", collections.Counter())
    rows = sorted(counts.items(), key=lambda item: -item[1].total())
    told = [
        f"{file}: {reasons.total():,} ({', '.join(f'{reason} {n:,}' for reason, n in reasons.most_common())})"
        for file, reasons in rows[:FILES]
    ]
    told += [f"and {sum(r.total() for _, r in rows[FILES:]):,} of {len(rows) - FILES:,} more files"] * (
        len(rows) > FILES
    )
    return told + [f"{count:,} {'file' if count == 1 else 'files'}: {reason}" for reason, count in single.most_common()]


def _places(reason: str, found: list[tuple[str, str]]) -> str:
    details = {detail for _, detail in found}
    if len(details) == 1 and (detail := details.pop()):
        return f"{reason} ({detail}): {listed([place for place, _ in found], len(found))}"
    return f"{reason}: {listed([f'{place} ({detail})' if detail else place for place, detail in found], len(found))}"
