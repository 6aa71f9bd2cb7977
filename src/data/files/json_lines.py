"""Lines of JSON in files, by number: where they lie is found once, what they say is read when it is asked for."""

from __future__ import annotations

import codecs
import fnmatch
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from src.common.files.store import is_remote
from src.common.files.strict_json import is_wide, parse_json
from src.data.example import BadRow
from src.data.files.compressed import unpacked
from src.data.files.index_cache import cached_table, stamp
from src.data.files.left_out import LeftOut, is_system_file, is_system_folder, kind_of_file, warn_tests

LINE_BYTES = 4 << 20  # longer lines are not read
OPEN = 64  # files at a time
REWRITE, RENAME = "write each element in a line", ", or call the file *.json"  # of a list
KEPT = 1 << 26  # bytes of a file from which on the places of its lines are kept in the cache


INK = np.ones(256, bool)  # bytes that are no white space; zeros of a file that was not written to its end are none
INK[list(b" \t\n\v\f\r")] = False


class LineFile:
    """The lines of a local or remote file by number, found once and not kept; each should be a JSON object. Lines of
    white space alone are no rows. `lists`: who opens it reads a list, too, where the file is called *.json. A file in
    gzip or zstd is unpacked first.

    Raises FileNotFoundError, ValueError for a folder, UTF-16, and one JSON value over several lines, and as `unpacked`.
    """

    def __init__(self, path: epath.Path, name: str = "", *, lists: bool = False):
        self.name, self.advice = name or path.name, REWRITE + RENAME * lists
        self.path = unpacked(path)
        check_utf8(self.path)
        _check_first(self.path, self.advice)
        self._key = object()  # the file may have been another one when others opened it
        large = self.path.stat().st_size > KEPT
        self.ends = cached_table("lines", [stamp(self.path)], self._find) if large else self._find()

    def _find(self) -> np.ndarray:
        return line_ends(self.path)

    def __len__(self) -> int:
        return len(self.ends)

    def where(self, line: int) -> str:
        """A row's line for people, who count from 1, blank lines too."""
        return f"{self.name} line {int(self.ends[line, 1])}"

    def __getitem__(self, line: int) -> dict[str, Any]:
        start, end = int(self.ends[line - 1, 0]) if line else 0, int(self.ends[line, 0])  # blank lines in front, too
        opened = _opened(self.path, self._key)  # stays open as long as it has a name here
        return read_object(opened.number, start, end, self.where(line), self.advice)


class _Opened:
    """A file that is open until nobody reads it any more, whichever thread that is."""

    def __init__(self, path: str | os.PathLike[str]):
        self.number = -1
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


@functools.lru_cache(OPEN)
def _opened(path: str | os.PathLike[str], key: object) -> _Opened:
    return _Opened(path)


def line_ends(path: str | os.PathLike[str]) -> np.ndarray:
    """Where each line of a file ends, its line break included, and its number from 1: int64 `[lines, 2]`, without the
    lines of white space alone. Line breaks are \\n, \\r\\n and \\r, none of which is inside a text of JSON."""
    ends, solid, size, count, returned = [], [], 0, 0, False
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            data = np.frombuffer(block, np.uint8)
            places = np.flatnonzero(_breaks(block, data, returned))
            returned = block.endswith(b"\r")
            ends.append(places + size + 1)
            ink = INK[data]
            if not size and block.startswith(codecs.BOM_UTF8):
                ink[: len(codecs.BOM_UTF8)] = False
            written = np.concatenate([[0], np.cumsum(ink)])  # characters that are no white space, before each place
            solid.append(written[places] + count)
            size, count = size + len(block), count + int(written[-1])
    found, before = np.concatenate([*ends, np.zeros(0, np.int64)]), np.concatenate([*solid, np.zeros(0, np.int64)])
    if size and not (len(found) and found[-1] == size):
        found, before = np.append(found, size), np.append(before, count)
    lines = np.stack([found, np.arange(1, len(found) + 1)], 1).astype(np.int64)
    return lines[np.diff(before, prepend=0) > 0]


def _breaks(block: bytes, data: np.ndarray, returned: bool) -> np.ndarray:
    """Which bytes of a block end a line; `returned`: the block before ended with \\r."""
    breaks = data == ord("\n")
    if b"\r" not in block and not returned:
        return breaks
    returns = data == ord("\r")
    behind = np.concatenate([[returned], returns[:-1]])
    # Of \r\n the first half ends the line; the second is white space in front of the next.
    return returns | (breaks & ~behind)


def read_object(file: int, start: int, end: int, where: str, advice: str = "") -> dict[str, Any]:
    """The JSON object in some bytes of an open file; `advice` is about a list. Raises BadRow."""
    if end - start > LINE_BYTES:
        raise BadRow("the line is too long", where, f"more than {LINE_BYTES:,} bytes")
    # One call that leaves the file's position alone: threads share it.
    return parse_example(os.pread(file, end - start, start), where, advice)


def parse_example(data: bytes, where: str, advice: str = "") -> dict[str, Any]:
    """The JSON object of a line or record; NaN and infinity, which Python writes, are numbers; `advice` is about a
    list. Raises BadRow."""
    text_of(data, where)
    try:
        told = parse_json(data, "it", finite=False)
    except ValueError as error:
        raise BadRow("the line is not JSON", where, error) from error
    if not isinstance(told, dict):
        kind = {list: "a list", str: "a text"}.get(type(told), "a number or truth")
        raise BadRow("the line is not a JSON object", where, f"it is {kind}" + f": {advice}" * bool(advice))
    return told


def text_of(data: bytes, where: str) -> str:
    """UTF-8 text without a byte order mark. Raises BadRow, also for UTF-16."""
    if is_wide(data):
        raise BadRow("the text is not UTF-8", where, "it is UTF-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRow("the text is not UTF-8", where, error) from error


def caption_of(data: bytes, where: str) -> str:
    """The text of a file that is one caption, with \\n for the line breaks of any system. Raises BadRow."""
    return text_of(data, where).replace("\r\n", "\n").replace("\r", "\n").strip()


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Raises ValueError for a folder, a pipe or a device, and for a file that begins as UTF-16 does."""
    if os.path.isdir(path):
        raise ValueError(f"{os.fspath(path)!r} is a folder and should be a file: give the files in it, or rename it")
    if not os.path.isfile(path):  # who opens a pipe waits
        raise ValueError(f"{os.fspath(path)!r} is not a plain file: give one, or remove it")
    with open(path, "rb") as file:
        if is_wide(file.read(4)):
            raise ValueError(f"{os.fspath(path)!r} is UTF-16 text: save it as UTF-8")


def _check_first(path: str | os.PathLike[str], advice: str) -> None:
    """Raises ValueError for a file whose first line only begins a list or object that goes on behind it; `advice` is
    about a list."""
    with open(path, "rb") as file:
        lines = file.read(1 << 16).removeprefix(codecs.BOM_UTF8).strip().splitlines()
    first = lines[0].strip() if len(lines) > 1 else b""
    if first in (b"[", b"{") or (first.startswith(b"[") and first.endswith(b",")):
        what, advice = ("list", advice) if first.startswith(b"[") else ("object", "write each row in one line")
        raise ValueError(
            f"{os.fspath(path)!r} is one JSON {what} over several lines, and each line should be a row: {advice}; a"
            " file that holds no rows should lie elsewhere"
        )


class JsonLines:
    """The lines of all files of a folder that are called like `names` (`*.jsonl`, in small letters or capitals), one
    file after the other by name; of several `names` the first that there are files of. `opened` makes a file's rows of
    its path. What else the folder holds is in `left`.

    Raises FileNotFoundError if there is no such file, saying what a line should be (`line`), and as `opened`.
    """

    def __init__(self, folder: epath.Path, names: Sequence[str], line: str, opened: Callable[..., Any] = LineFile):
        paths = [p for p in folder.iterdir() if not is_system_file(p.name)] if folder.is_dir() else []
        paths, self.left = sorted(paths, key=lambda path: path.name), LeftOut()
        found = (_called(name, folder, paths) for name in names)
        chosen = next(filter(None, found), [])
        warn_tests(folder, [os.path.relpath(path, folder) for path in chosen])
        above = {parent for path in chosen for parent in path.parents}  # of names with a slash
        for path in paths:
            if path not in chosen and path not in above and not is_system_folder(path.name):
                is_folder = not is_remote(path) and path.is_dir()
                self.left.add("folders" if is_folder else kind_of_file(path.name), path.name)
        if not chosen:
            raise FileNotFoundError(
                f"{os.fspath(folder)!r} has no {' or '.join(names[:2])}: give a folder with such files, a line {line}"
                + (f"; {', '.join(names[2:])} are read, too" if names[2:] else "")
                + (f" (it has {self.left})" if self.left else "")
            )
        self.paths = chosen
        self.files = [opened(path) for path in chosen]
        for path, file in zip(chosen, self.files, strict=True):
            if not len(file):
                self.left.add("files without a row", path.name)
        self._starts = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return [stamp(file.path) for file in self.files]

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        """What a line says, and its name. Raises BadRow."""
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        file, line = self.files[number], index - int(self._starts[number])
        return file[line], file.where(line)


def _called(pattern: str, folder: epath.Path, paths: Sequence[epath.Path]) -> list[epath.Path]:
    """Those of a folder's `paths` that have a name of this form; hidden ones only if the form begins as they do."""
    if "/" in pattern:  # of folders below
        return sorted(folder.glob(pattern), key=lambda path: path.name)
    hidden = pattern.startswith(".")
    alike = lambda name: fnmatch.fnmatchcase(name.lower(), pattern.lower())
    return [path for path in paths if alike(path.name) and (hidden or not path.name.startswith("."))]
