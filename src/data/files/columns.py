"""Parquet and Arrow files: rows by number, of which a file's groups of rows are read when they are asked for.

The footer says where the groups are; the cache keeps what it says. A row costs its group, so the last groups stay in
memory: rows in their order cost each group once, shuffled rows may cost a group each.
"""

from __future__ import annotations

import collections
import functools
import json
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from src.common.files.store import local_copy
from src.data.example import BadRow
from src.data.files.index_cache import cached_table, stamp

ENDINGS = (".parquet", ".arrow")
OPEN = 64  # files at a time
KEPT = 4  # groups of rows in memory, of a process
LARGE = 1 << 26  # bytes of a group from which on a warning says what a shuffled row costs
END = b"\xff\xff\xff\xff\0\0\0\0"  # of an Arrow stream
_groups: collections.OrderedDict[tuple[int, int], Any] = collections.OrderedDict()
_LOCK = threading.Lock()


class ColumnFile:
    """The rows of a local or remote file by number, each a dict of values by column.

    columns   those that are read; None: all

    Raises FileNotFoundError, and ValueError for a file that is damaged or cut off, or lacks a column.
    """

    def __init__(self, path: epath.Path, columns: Sequence[str] | None = None):
        self.name, self.path = path.name, local_copy(path)
        if not self.path.is_file():
            raise ValueError(f"{os.fspath(path)!r} is not a plain file: give one, or remove it")
        table = cached_table("columns", [stamp(self.path)], lambda: _footer(self.path))
        about = json.loads(np.asarray(table).tobytes())
        self.types: dict[str, str] = about["types"]
        self.features: dict[str, Any] = about["features"]
        self.group_bytes: int = about["bytes"]
        self.columns = columns
        if missing := [column for column in columns or () if column not in self.types]:
            raise ValueError(
                f"{os.fspath(path)!r} has no column {missing[0]!r}: name one of {', '.join(map(repr, self.types))}"
            )
        self._starts = np.cumsum([0, *about["rows"]])
        self._key = object()  # the file may have been another one when others opened it

    def __len__(self) -> int:
        return int(self._starts[-1])

    def where(self, row: int) -> str:
        """A row for people, who count from 1."""
        return f"{self.name} row {row + 1}"

    def __getitem__(self, row: int) -> dict[str, Any]:
        group = int(np.searchsorted(self._starts, row, side="right")) - 1
        try:
            table = self._group(group)
        except (OSError, ValueError) as error:  # those of pyarrow are of these kinds
            raise BadRow("the group of rows is damaged", self.where(row), error) from error
        try:
            return table.slice(row - int(self._starts[group]), 1).to_pylist()[0]
        except (ValueError, OverflowError) as error:
            raise BadRow("the row cannot be read", self.where(row), error) from error

    def _group(self, group: int) -> Any:
        key = (id(self._key), group)
        with _LOCK:
            if key in _groups:
                _groups.move_to_end(key)
                return _groups[key][1]
        table = _opened(self.path, self._key).read(group, self.columns)
        with _LOCK:
            _groups[key] = self._key, table  # the key stays alive, so its number is no other file's
            while len(_groups) > KEPT:
                _groups.popitem(last=False)
        return table


class _Reader:
    """An open file and its groups of rows; threads read one after the other."""

    def __init__(self, path: os.PathLike[str]):
        import pyarrow as pa
        import pyarrow.parquet

        self._lock, self._parquet, self._file = threading.Lock(), None, None
        if os.fspath(path).lower().endswith(".parquet"):
            self._parquet = pyarrow.parquet.ParquetFile(path, page_checksum_verification=True)
            self.schema, self.groups = self._parquet.schema_arrow, self._parquet.num_row_groups
            return
        source = pa.memory_map(os.fspath(path))
        try:
            self._file = pa.ipc.open_file(source)
            self.schema, self.groups = self._file.schema, self._file.num_record_batches
        except pa.ArrowInvalid:  # as data sets of Hugging Face are saved: its arrays stay in the file
            stream = pa.ipc.open_stream(pa.memory_map(os.fspath(path)))
            self._batches = list(stream)
            if not _ends_with(path, END):  # cut off behind a batch
                raise ValueError("its end is missing") from None
            self.schema, self.groups = stream.schema, len(self._batches)

    def rows(self) -> list[int]:
        """Rows of each group."""
        if self._parquet:
            return [self._parquet.metadata.row_group(group).num_rows for group in range(self.groups)]
        return [self._batch(group).num_rows for group in range(self.groups)]

    def _batch(self, group: int) -> Any:
        return self._file.get_batch(group) if self._file else self._batches[group]

    def bytes(self) -> int:
        """Bytes of the largest group, unpacked; 0 for Arrow, whose rows are read in place."""
        if not self._parquet:
            return 0
        sizes = (self._parquet.metadata.row_group(group).total_byte_size for group in range(self.groups))
        return max(sizes, default=0)

    def read(self, group: int, columns: Sequence[str] | None = None) -> Any:
        """A group as a table. Raises what pyarrow raises: OSError and ValueError."""
        with self._lock:
            if self._parquet:
                return self._parquet.read_row_group(group, columns and list(columns), use_threads=False)
            batch = self._batch(group)
        batch = batch.select(list(columns)) if columns else batch
        batch.validate(full=True)  # places outside of the file would end the process
        return batch


def _ends_with(path: os.PathLike[str], end: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(-len(end), os.SEEK_END)
        return file.read() == end


@functools.lru_cache(OPEN)
def _opened(path: os.PathLike[str], key: object) -> _Reader:
    return _Reader(path)


def _footer(path: os.PathLike[str]) -> np.ndarray:
    """Rows of each group, type of each column and the features that Hugging Face wrote: JSON as uint8 [bytes].

    Raises ValueError.
    """
    try:
        file = _Reader(path)
        rows, size = file.rows(), file.bytes()
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:120]
        raise ValueError(f"{os.fspath(path)!r} is no whole Parquet or Arrow file ({reason}): copy it again") from error
    types = {field.name: _plain(str(field.type)) for field in file.schema}
    told = (file.schema.metadata or {}).get(b"huggingface", b"{}")
    try:
        features = json.loads(told)["info"]["features"]
    except (ValueError, KeyError, TypeError):
        features = {}
    about = {"rows": rows, "types": types, "features": features if isinstance(features, dict) else {}, "bytes": size}
    return np.frombuffer(json.dumps(about).encode(), np.uint8)


def _plain(kind: str) -> str:
    """A type without what makes no difference here: the width of offsets and the names of lists' elements."""
    return re.sub(r"list<\w+(?: not null)?:", "list<item:", kind.replace("large_", "").replace("_view", ""))


def check_schemas(files: Sequence[ColumnFile]) -> None:
    """Warns of large groups of rows. Raises ValueError, naming both, for a file with another column or type, among
    those that are read, than the first one; a column of nulls alone has any type."""
    for file in files[1:]:
        for column in files[0].columns or {**files[0].types, **file.types}:
            first, other = files[0].types.get(column), file.types.get(column)
            if first != other and "null" not in (first, other):
                told = f"has the column {column!r} as {other}" if other else f"has no column {column!r}"
                wanted = f"has it as {first}" if first else "has none"
                raise ValueError(
                    f"{os.fspath(file.path)!r} {told}, and {files[0].name} {wanted}: write all files with one schema"
                )
    if files and (size := max(file.group_bytes for file in files)) > LARGE:
        told = "%s: groups of rows have up to %d MB, and a shuffled row reads its group: see src.tools.prepare"
        logging.warning(told, os.fspath(files[0].path.parent), size // 10**6)
