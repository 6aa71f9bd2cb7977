"""Bad rows in few words: every file is named once, however many of its rows are bad."""

from __future__ import annotations

import collections
import re
from collections.abc import Iterable, Mapping
from typing import Any

from src.common.tree import listed

FILES = 10  # files that a summary names
# "train.jsonl line 3 turns 1 to 2", "00001.arrayrecord record 7", "a.tar fox.jpg"; else the place is a file itself
PLACE = re.compile(r"(.+) ((?:line|element|record) \d+(?: [^/]*)?)|(.+?\.tar) (.+)")
Told = tuple[str, str, str]  # where, reason and detail of a `BadRow`


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
