"""Examples in files by number: what a source of files is, and the tasks that read one.

A source has a `kind`, a length, and gives the example of a number or raises `BadRow`. It is a function of its files and
the number, is shared by threads, and is opened by each worker process on its own.

    kind       what `Example.told` says of the picture
    captions   texts by name, "caption" or others
    classes    "label", an index into the source's `classes`, [{"id": "n01440764", "name": "tench"}]
    chats      "turns", texts of user and assistant in turn; the marker `<image>` is where the picture stands, if any
"""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
from etils import epath

from src.common.files import local_copy
from src.common.strict_json import parse_json
from src.data.ledger import BadRow
from src.data.moments import check_moments
from src.data.rows import RowTask, check_split
from src.data.tables import cached_table, stamp

LINE_BYTES = 4 << 20  # longer lines are not read
KEPT = 1 << 26  # bytes of a file from which on the places of its lines are kept in the cache
MARKER = "<image>"


class Example(NamedTuple):
    """What is `told`, and the picture, a path or the bytes of a file or None; `where` names the row in reports."""

    where: str
    told: dict[str, Any]
    image: epath.Path | bytes | None


class Examples(Protocol):
    """A source of files."""

    kind: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


class LineFile:
    """The lines of a local or remote file by number, found once and not kept; each should be a JSON object.

    Raises FileNotFoundError.
    """

    def __init__(self, path: epath.Path, name: str = ""):
        self.name = name or path.name
        self.path = local_copy(path)
        large = self.path.stat().st_size > KEPT
        self.ends = cached_table("lines", [stamp(self.path)], self._find) if large else self._find()

    def _find(self) -> np.ndarray:
        return line_ends(self.path)

    def __len__(self) -> int:
        return len(self.ends)

    @functools.cached_property
    def _file(self) -> int:
        return os.open(self.path, os.O_RDONLY)

    def where(self, line: int) -> str:
        """A line for people, who count from 1."""
        return f"{self.name} line {line + 1}"

    def __getitem__(self, line: int) -> dict[str, Any]:
        start, end = int(self.ends[line - 1]) if line else 0, int(self.ends[line])
        return read_object(self._file, start, end, self.where(line))


def line_ends(path: str | os.PathLike[str]) -> np.ndarray:
    """Where each line of a file ends, its line break included: int64 `[lines]`."""
    ends, size = [], 0
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            ends.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + size + 1)
            size += len(block)
    found = np.concatenate([*ends, np.zeros(0, np.int64)])
    return found if not size or (len(found) and found[-1] == size) else np.append(found, size)


def read_object(file: int, start: int, end: int, where: str) -> dict[str, Any]:
    """The JSON object in some bytes of an open file. Raises BadRow."""
    if end - start > LINE_BYTES:
        raise BadRow("the line is too long", where, f"more than {LINE_BYTES:,} bytes")
    # One call that leaves the file's position alone: threads share it.
    return parse_example(os.pread(file, end - start, start), where)


def parse_example(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object of a line or record. Raises BadRow."""
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise BadRow("the text is not UTF-8", where, error) from error
    try:
        told = parse_json(data, "it")
    except ValueError as error:
        raise BadRow("the line is not JSON", where, error) from error
    if not isinstance(told, dict):
        raise BadRow("the line is not a JSON object", where)
    return told


def caption_of(told: dict[str, Any], where: str, name: str = "caption") -> str:
    """The text `name` of an example, not empty. Raises BadRow."""
    caption = told.get(name)
    if not isinstance(caption, str):
        raise BadRow(f"there is no {name}", where)
    if not caption.strip():
        raise BadRow(f"the {name} is empty", where)
    return caption


def turns_of(told: dict[str, Any], where: str) -> list[str]:
    """The turns of a chat: texts that are not empty, user and assistant, at least one of each. Raises BadRow."""
    turns = told.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise BadRow("the turns are no list of texts", where)
    if len(turns) < 2 or len(turns) % 2:
        raise BadRow("the turns are not question and answer", where, f"{len(turns)} turns")
    empty = [place for place, turn in enumerate(turns) if not turn.strip()]
    if empty:
        raise BadRow("a turn is empty", where, f"turn {empty[0] + 1} of {len(turns)}")
    return turns


def label_of(told: dict[str, Any], where: str, classes: int) -> int:
    """The class of an example. Raises BadRow."""
    label = told.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise BadRow("the label is no class", where, f"{label} of {classes} classes")
    return label


def check_told(kind: str, example: Example, classes: int = 0) -> None:
    """What can be said of an example without its task. Raises BadRow."""
    told, where = example.told, example.where
    if kind == "classes":
        label_of(told, where, classes)
    elif kind == "chats":
        turns_of(told, where)
    elif not any(isinstance(text, str) and text.strip() for text in told.values()):
        caption_of(told, where)


class ExampleTask(RowTask):
    """A task over a source of files, or over shards that `tools.prepare` made of it.

    records    a folder of such shards, read instead of the source's own files
    held_out   how many rows are the split "test": the last ones, or, with `spread`, some all over the source

    The source is opened at the first row, so that spec and `fake` work without it. Subclasses say how (`open`).
    """

    kind: ClassVar[str] = "captions"
    spread: ClassVar[bool] = False

    def __init__(self, *, records: str | os.PathLike[str] = "", held_out: int = 0):
        if held_out < 0:
            raise ValueError(f"held_out={held_out} is not possible: give no negative number of rows")
        self.records, self.held_out = records, held_out

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "examples"}

    def open(self) -> Examples:
        """The source.

        Raises FileNotFoundError if files are missing, ValueError if they are damaged.
        """
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Examples:
        """The source, or its shards."""
        if not self.records:
            return self.open()
        from src.data.records import Shards  # which imports this file

        shards = Shards(epath.Path(self.records), self.kind)
        check_moments(shards.moments, self.image_shape, self.name, os.fspath(self.records))
        return shards

    @property
    def latents_of(self) -> str | None:
        """The hash of the codec whose moments of latents the data are, None for pictures."""
        moments = getattr(self.examples, "moments", None)
        return moments and moments.codec

    def rows(self, split: str) -> int:
        """Rows of the split, bad ones included.

        Raises FileNotFoundError if files are missing, ValueError if they are damaged or the split is empty.
        """
        check_split(self.name, split)
        total = len(self.examples)
        rows = self.held_out if split == "test" else total - self.held_out
        if not 0 < rows <= total:
            raise ValueError(
                f"split {split!r} of task {self.name} is empty: it has {total} rows and held_out={self.held_out} of"
                " them are for test: give more, or set another held_out"
            )
        return rows

    def example(self, split: str, index: int) -> Example:
        """The example of a row. Raises BadRow."""
        return self.examples[self.place(split, index)]

    def place(self, split: str, index: int) -> int:
        """Number of a row in the source."""
        if not self.held_out:
            return index
        if not self.spread:
            return index + (self.rows("train") if split == "test" else 0)
        held = (2 * np.arange(self.held_out) + 1) * len(self.examples) // (2 * self.held_out)
        if split == "test":
            return int(held[index])
        return index + int(np.searchsorted(held - np.arange(self.held_out), index, side="right"))


def given(value: str | os.PathLike[str], option: str, task: str) -> epath.Path:
    """A path that a task needs. Raises ValueError where it is empty."""
    if not os.fspath(value):
        raise ValueError(f"task {task} needs {option}, or records of it: give the path in tasks.<name>.data.{option}")
    return epath.Path(value)
