"""Tar shards as WebDataset has them: the files `a/7.jpg` and `a/7.txt` of one archive, one behind the other, are an
example, an image with its caption. A caption is a text file, or the "caption" of a JSON file.

The archives of a folder are read through once to see where each file lies (`files/index_cache.py`); then every example
is read where it is, nothing is unpacked. Compressed archives have no such places and are refused.
"""

from __future__ import annotations

import os
import pathlib
import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
from absl import logging

from src.common.files.images import LIMITS
from src.common.files.store import local_copy
from src.common.tree import listed
from src.data.example import BadRow, Example
from src.data.files.index_cache import cached_table, stamp
from src.data.files.json_lines import LINE_BYTES, parse_example
from src.data.sources._files import FileSource

IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
TEXTS = ("txt", "json")  # the first one there is used
SHARD, IMAGE, IMAGE_SIZE, TEXT, TEXT_SIZE, IS_JSON, NAMED = range(7)  # columns
ABSENT = -1


class WebDataset(FileSource):
    """`image` and `caption` of the examples of a folder's `*.tar`, in the order of the archives' names and of their
    files; `held_out` rows are "test"."""

    def __init__(self, folder: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.folder = folder

    def open(self) -> tuple[list[pathlib.Path], np.ndarray]:
        """The archives, and where the examples lie in them: int64 [n, 7].

        Raises FileNotFoundError for a folder without archives, ValueError naming those that are cut off, damaged or
        compressed.
        """
        folder = self.path("folder")
        found = sorted(p for p in folder.iterdir() if p.suffix == ".tar") if folder.exists() else []
        if not found:
            raise FileNotFoundError(f"{os.fspath(folder)!r} has no *.tar: give a folder of uncompressed archives")
        paths, tables, wrong = [local_copy(path) for path in found], [], []
        for number, path in enumerate(paths):
            try:
                table = cached_table("tar", [stamp(path)], lambda path=path: scan(path))
                tables.append(np.column_stack([np.full(len(table), number, np.int64), table]))
            except (tarfile.TarError, EOFError, ValueError, OSError, RecursionError) as error:
                wrong.append(f"{path.name} ({error})")
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(found)} archives of {os.fspath(folder)!r} cannot be read: {listed(wrong)}:"
                " copy them again, and unpack .gz and the like"
            )
        return paths, np.concatenate(tables)

    def __len__(self) -> int:
        return len(self.files[1])

    def __getitem__(self, number: int) -> Example:
        row = self.files[1][number]
        path = self.files[0][int(row[SHARD])]
        where = f"{path.name} {_name(path, row)}"
        if not row[NAMED]:
            raise BadRow("the name of the file is not allowed", where)
        if row[IMAGE] == ABSENT:
            raise BadRow("the image is missing", where)
        if row[TEXT] == ABSENT:
            raise BadRow("there is no caption", where)
        if row[TEXT_SIZE] > LINE_BYTES or row[IMAGE_SIZE] > LIMITS.bytes:
            raise BadRow("the file is too long", where, f"{max(row[TEXT_SIZE], row[IMAGE_SIZE]):,} bytes")
        text = _read(path, row[TEXT], row[TEXT_SIZE])
        if row[IS_JSON]:
            texts = {name: text for name, text in parse_example(text, where).items() if isinstance(text, str)}
        else:
            try:
                texts = {"caption": text.decode("utf-8-sig").strip()}
            except UnicodeDecodeError as error:
                raise BadRow("the text is not UTF-8", where, error) from error
        return Example(texts | {"image": _read(path, row[IMAGE], row[IMAGE_SIZE])}, where)


def _read(path: pathlib.Path, start: Any, size: Any) -> bytes:
    with open(path, "rb", buffering=0) as file:  # thousands of archives cannot all stay open
        return os.pread(file.fileno(), int(size), int(start))


def _name(path: pathlib.Path, row: np.ndarray) -> str:
    """The name in the header before the example's first file, as far as it fits there."""
    start = row[IMAGE] if row[IMAGE] != ABSENT else row[TEXT]
    return _read(path, start - tarfile.BLOCKSIZE, 100).split(b"\0")[0].decode(errors="replace")


def scan(path: str | os.PathLike[str]) -> np.ndarray:
    """Where the examples of an archive lie: int64 [n, 6], the columns from `IMAGE` on; `ABSENT` is what is not there.

    Raises tarfile.TarError or EOFError for what is no whole archive.
    """
    rows: list[list[int]] = []
    last, ranks, left = None, {}, []
    with open(path, "rb") as file:
        for entry in _entries(file):
            folder, _, base = entry.name.rpartition("/")
            stem, _, ending = base.partition(".")
            ending = ending.lower()
            if not stem or ending not in (*IMAGES, *TEXTS):
                if stem and ending.rpartition(".")[2] in (*IMAGES, *TEXTS):
                    left.append(entry.name)
                continue
            if last != (folder, stem):
                rows.append([ABSENT, 0, ABSENT, 0, 0, 1])
                last, ranks = (folder, stem), {}
            kind, rank = ("image", 0) if ending in IMAGES else ("text", TEXTS.index(ending))
            if rank >= ranks.get(kind, len(TEXTS)):
                continue  # a second image, or a text that another one goes before
            ranks[kind] = rank
            column = IMAGE - 1 if kind == "image" else TEXT - 1
            rows[-1][column : column + 2] = entry.offset_data, entry.size
            if kind == "text":
                rows[-1][IS_JSON - 1] = int(ending == "json")
            rows[-1][NAMED - 1] &= not entry.name.startswith("/") and ".." not in entry.name.split("/")
    if left:
        logging.warning("%s: %d files have more than one ending and are left out, such as %s", path, len(left), left[0])
    return np.array(rows, np.int64).reshape(-1, NAMED)


def _entries(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The plain files of an archive, in their order."""
    size, last = os.fstat(file.fileno()).st_size, -1
    with tarfile.open(fileobj=file, mode="r:") as archive:
        while (entry := archive.next()) is not None:
            archive.members.clear()  # or all names are kept
            if not last < entry.offset < entry.offset_data + max(entry.size, -1) <= size:
                raise tarfile.ReadError("it is cut off or damaged")
            last = entry.offset
            if entry.isreg() and not entry.issparse():
                yield entry
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("its end is missing or damaged")
        while block := file.read(1 << 20):
            if any(block):
                raise tarfile.ReadError("it goes on after its end, as two archives in one file do")
