"""Files of ArrayRecord that follow each other, read by number, and how one is written."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from etils import epath

from src.common.files.store import is_remote, local_copy
from src.data.example import BadRow

OPEN = 256  # shards at a time
OPTIONS = "group_size:1"  # a record has its own checksum: damage spoils no other


class ShardFiles:
    """The records of the files `shards`, (name, rows) each, one file after the other. Threads share it: the last `OPEN`
    files that were read stay open."""

    def __init__(self, folder: epath.Path, shards: Sequence[tuple[str, int]]):
        self.folder, self._shards = folder, list(shards)
        self._starts = np.cumsum([0, *(rows for _, rows in shards)])
        self._open: dict[str, Any] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> tuple[bytes, str]:
        """A record, and its name in reports. Raises BadRow."""
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        name, place = self._shards[shard][0], index - int(self._starts[shard])
        where = f"{name} record {place}"
        try:
            return self.record(name, place), where
        except RuntimeError as error:
            raise BadRow("the record is damaged", where, error) from error

    def record(self, name: str, place: int) -> bytes:
        """A record of one file. Raises RuntimeError where it is damaged."""
        return self._reader(name).read([place])[0]

    def _reader(self, name: str) -> Any:
        with self._lock:
            reader = self._open.pop(name, None) or _reader(local_copy(self.folder / name))
            self._open[name] = reader  # the last one
            if len(self._open) > OPEN:  # closed when no thread reads it any more
                del self._open[next(iter(self._open))]
            return reader

    def damaged(self) -> list[str]:
        """Names of files that cannot be opened or do not have their rows; remote ones are not looked into."""
        here = [(name, rows) for name, rows in self._shards if not is_remote(self.folder / name)]
        return [name for name, rows in here if not self._sound(name, rows)]

    def _sound(self, name: str, rows: int) -> bool:
        reader = _reader(self.folder / name)
        try:
            return reader.ok() and reader.num_records() == rows
        finally:
            with contextlib.suppress(RuntimeError):  # it tells of the damage again
                reader.close()


def _reader(path: Any) -> Any:
    """A reader of a local file; an error at opening is told when it reads."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fspath(path))


def write_shard(path: str | os.PathLike[str], records: Iterable[bytes]) -> dict[str, Any]:
    """Writes one local file and returns its rows, bytes and SHA-256; equal records give equal bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, rows = ArrayRecordWriter(os.fspath(path), OPTIONS), 0
    for record in records:
        writer.write(record)
        rows += 1
    writer.close()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"rows": rows, "bytes": os.path.getsize(path), "sha256": digest.hexdigest()}
