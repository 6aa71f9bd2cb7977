"""A JSON file that is one long list: where each element lies, without reading it as JSON."""

from __future__ import annotations

import codecs
import functools
import os
from typing import Any

import numpy as np
from etils import epath

from src.data.files.columns import ENDINGS as COLUMNS
from src.data.files.columns import ColumnFile
from src.data.files.compressed import ENDINGS, unpacked
from src.data.files.index_cache import cached_table, stamp
from src.data.files.json_lines import LineFile, check_utf8, read_object

BLOCK = 1 << 22
SPACE = b" \t\r\n"


class ListFile:
    """The elements of a local or remote JSON list by number; each should be an object. The index is kept in the cache.

    An element that is not sound JSON is a bad row, whatever it holds, as long as its quotes and brackets close. Raises
    FileNotFoundError, and ValueError for a file that is no list or does not end.
    """

    def __init__(self, path: epath.Path):
        self.name, self.path = path.name, unpacked(path)
        check_utf8(self.path)
        self._bounds = cached_table("list", [stamp(self.path)], lambda: element_bounds(self.path))

    def __len__(self) -> int:
        return len(self._bounds) - 1

    @functools.cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def where(self, index: int) -> str:
        """An element for people, who count from 1."""
        return f"{self.name} element {index + 1}"

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, end = int(self._bounds[index]) + 1, int(self._bounds[index + 1])
        return read_object(self._file, start, end, self.where(index))


def open_rows(path: epath.Path) -> LineFile | ListFile | ColumnFile:
    """The rows of a local or remote file: the elements of a `.json` (also in gzip or zstd) that is one list, the lines
    of any other.

    Those of Parquet and Arrow, too. Raises as `LineFile`, `ListFile` and `ColumnFile`.
    """
    name = path.name.lower()
    if name.endswith(COLUMNS):
        return ColumnFile(path)
    is_json = any(name.endswith(".json" + packed) for packed in ("", *ENDINGS))
    if is_json:
        check_utf8(local := unpacked(path))
        with open(local, "rb") as file:
            if file.read(4096).removeprefix(codecs.BOM_UTF8).lstrip(SPACE).startswith(b"["):
                return ListFile(path)
    return LineFile(path, lists=not is_json)


def element_bounds(path: str | os.PathLike[str]) -> np.ndarray:
    """Places of the list's opening bracket, the commas between its elements and its closing bracket: int64 [n + 1].

    Looks at quotes, backslashes and brackets only, some megabytes at a time. Raises ValueError, in one sentence, for a
    file that is no list, ends before the list does or goes on after it.
    """
    bounds: list[np.ndarray] = []
    start, depth, marks = 0, 0, _Marks()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            plain = block.removeprefix(codecs.BOM_UTF8) if not start else block
            if depth == 0 and (rest := plain.strip(SPACE)) and (bounds or not rest.startswith(b"[")):
                if bounds:
                    raise ValueError(_wrong(path, "goes on after its list"))
                raise ValueError(_wrong(path, "does not begin with [") + ", or call a file of lines *.jsonl")
            places, steps = marks.find(np.frombuffer(block, np.uint8))
            depths = depth + np.cumsum(steps)
            ends = np.flatnonzero(depths <= 0)
            if len(ends) and block[places[ends[0]] + 1 :].strip(SPACE):
                raise ValueError(_wrong(path, "goes on after its list"))
            kept = ((depths == 1) & (steps == 0)) | (depths <= 0)
            if len(kept) and not bounds:
                kept[0] = True
            if kept.any():
                bounds.append(places[kept] + start)
            start, depth = start + len(block), int(depths[-1]) if len(depths) else depth
        if not bounds or depth or marks.quoted:
            raise ValueError(_wrong(path, "ends before its list does"))
        joined = np.concatenate(bounds)
        file.seek(joined[0] + 1)
        empty = len(joined) == 2 and not file.read(min(joined[1] - joined[0] - 1, 1 << 16)).strip(SPACE)
    return joined[:1] if empty else joined


class _Marks:
    """Finds brackets and commas outside of strings, block after block."""

    def __init__(self) -> None:
        self.quoted = False  # whether a string is open at the end of the block
        self._escaped = False  # whether the next character has a backslash before it
        self._kinds = np.zeros(256, np.int8)
        for characters, kind in ((b"[{", 1), (b"]}", 2), (b",", 3)):
            self._kinds[list(characters)] = kind

    def find(self, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Their places [n], and what each adds to the depth [n]."""
        slashes, quotes = np.flatnonzero(data == ord("\\")), np.flatnonzero(data == ord('"'))
        runs = np.flatnonzero(np.diff(slashes, prepend=-2) != 1)  # where each run of backslashes begins
        lengths = np.diff(runs, append=len(slashes))
        first = slashes[runs]
        if self._escaped and len(first) and first[0] == 0:
            lengths[0] += 1
            first[0] -= 1
        escaped = (first + lengths)[lengths % 2 == 1]  # what an odd number of them stands before
        if self._escaped and data[0] != ord("\\"):
            escaped = np.append(escaped, 0)
        self._escaped = bool((escaped == len(data)).any())
        quotes = np.setdiff1d(quotes, escaped, assume_unique=True)
        kind = self._kinds[data]
        places = np.flatnonzero(kind)
        places = places[(np.searchsorted(quotes, places) + self.quoted) % 2 == 0]
        self.quoted = (len(quotes) + self.quoted) % 2 == 1
        return places, np.array([0, 1, -1, 0])[kind[places]]


def _wrong(path: str | os.PathLike[str], what: str) -> str:
    return f"{os.fspath(path)!r} is no JSON list, it {what}: give the whole file, [ … ]"
