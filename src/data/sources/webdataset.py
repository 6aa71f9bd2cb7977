"""Tar shards as WebDataset has them: the files `a/7.jpg` and `a/7.txt` of one archive, one behind the other, are an
example, an image with its caption. A caption is a text file, or the "caption" (or "text") of a JSON file.

The archives of a folder are read through once to see where each file lies (`files/index_cache.py`); then every example
is read where it is, nothing is unpacked. Compressed archives have no such places and are refused. Files of no example
are left out, and a warning has their number by ending.
"""

from __future__ import annotations

import multiprocessing
import os
import pathlib
import posixpath
import re
import tarfile
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from src.common.files.images import ENDINGS, LIMITS
from src.common.files.paths import shown
from src.common.files.store import is_remote, local_copy
from src.common.tree import listed
from src.data.example import BadRow, Example
from src.data.files.index_cache import stamp
from src.data.files.json_lines import LINE_BYTES, caption_of, parse_example
from src.data.files.left_out import (
    LeftOut,
    cached_listing,
    ending_of,
    is_system_file,
    is_system_folder,
    kind_of_file,
    tell_tests,
    warn_tests,
)
from src.data.sources._files import FileSource, texts_of_row
from src.data.told_once import is_for_tests

IMAGES = tuple(ending.removeprefix(".") for ending in ENDINGS)
TEXTS = ("txt", "json")  # the first one there is used
SHARD, IMAGE, IMAGE_SIZE, TEXT, TEXT_SIZE, IS_JSON, NAMED, AGAIN, TESTS, HEADER = range(10)  # columns
ABSENT = -1
DUMPED_FOLDER = b"D"  # of an incremental archive of GNU tar
COMPRESSED = re.compile(r"\.(tar\.(gz|bz2|xz|zst|lz4|lzma|z)|tgz|tbz2?|txz|tzst)$", re.IGNORECASE)


class WebDataset(FileSource):
    """`image` and `caption` of the examples of a folder's `*.tar`, in the order of the archives' names and of their
    files; `held_out` rows are "test"."""

    def __init__(self, folder: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.folder = folder

    def open(self) -> tuple[list[pathlib.Path], np.ndarray]:
        """The archives, and where the examples lie in them: int64 [n, 10]. Names that an archive has twice are told.

        Raises FileNotFoundError for a folder without archives, ValueError for one without examples, or naming archives
        that are cut off, damaged or compressed.
        """
        folder = self.path("folder")
        found, compressed, left = _archives(folder)
        wrong = [f"{name} (it is compressed)" for name in compressed]
        if not found and not wrong:
            told = f" (it has {left})" if left else ""
            raise FileNotFoundError(f"{os.fspath(folder)!r} has no *.tar: give a folder of uncompressed archives{told}")
        paths, tables = [local_copy(folder / name) for name in found], []
        for number, path in enumerate(paths):
            try:
                table, rest = cached_listing("tar-members", [stamp(path)], lambda path=path: scan(path))
                tables.append(np.column_stack([np.full(len(table), number, np.int64), table]))
                left.update(rest)
            except (tarfile.TarError, EOFError, ValueError, OSError, RecursionError) as error:
                wrong.append(f"{path.name} ({error})")
        if wrong:
            raise ValueError(
                f"{len(wrong)} archives of {os.fspath(folder)!r} cannot be read: {listed(wrong)}: copy them again, and"
                " unpack .gz and the like"
            )
        if not sum(map(len, tables)):
            raise ValueError(
                f"the archives of {os.fspath(folder)!r} have no example, an image and its text (1.jpg, 1.txt):"
                f" they have {left or 'nothing'}"
            )
        for path in (path for path, table in zip(paths, tables, strict=True) if not len(table)):
            left.add("archives without an example", path.name)
        left.warn(folder)
        warn_tests(folder, found)
        table = np.concatenate(tables)
        _warn_again(folder, paths, table)
        if len(tests := table[table[:, TESTS] == 1]):
            first = f"{paths[tests[0, SHARD]].name} {_name(paths[tests[0, SHARD]], tests[0])}"
            tell_tests(folder, len(tests), len(table), first, "examples")
        return paths, table

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
        texts = (
            texts_of_row(parse_example(text, where), where) if row[IS_JSON] else {"caption": caption_of(text, where)}
        )
        return Example(texts | {"image": _read(path, row[IMAGE], row[IMAGE_SIZE])}, where)


def _warn_again(folder: epath.Path, paths: list[pathlib.Path], table: np.ndarray) -> None:
    """Tells of examples with the name of an earlier one of their archive: `tar -r` and `tar -u` put what has changed
    behind the old, `tar -A` puts archives together whose numbers begin anew."""
    again = table[table[:, AGAIN] == 1]
    if len(again) and multiprocessing.parent_process() is None:
        first = f"{paths[again[0, SHARD]].name} {_name(paths[again[0, SHARD]], again[0])}"
        told = "%s: %d examples have a name that is there before in their archive, such as %s: both are read"
        logging.warning(told, os.fspath(folder), len(again), shown(first))


def _read(path: pathlib.Path, start: Any, size: Any) -> bytes:
    with open(path, "rb", buffering=0) as file:  # thousands of archives cannot all stay open
        return os.pread(file.fileno(), int(size), int(start))


def _name(path: pathlib.Path, row: np.ndarray) -> str:
    """The name of the example's first file in the archive."""
    try:
        with open(path, "rb") as file:
            file.seek(int(row[HEADER]))
            options = {"encoding": "utf-8", "errors": "replace", "tarinfo": _Entry}
            with tarfile.open(fileobj=file, mode="r:", **options) as archive:
                return archive.firstmember.name.removeprefix("./")
    except (tarfile.TarError, AttributeError):
        return f"byte {row[HEADER]}"


def _archives(folder: epath.Path) -> tuple[list[str], list[str], LeftOut]:
    """Names of a folder's archives, those of compressed ones, and what else it holds."""
    found, compressed, left = [], [], LeftOut()
    for path in sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []:
        name, hidden = path.name, path.name.startswith(".")
        if is_system_file(name) or is_system_folder(name):
            continue
        is_folder = not is_remote(path) and path.is_dir()
        if not is_remote(path) and path.exists() and not (is_folder or os.path.isfile(path)):
            left.add("devices and pipes", name)  # who opens a pipe waits
        elif name.lower().endswith(".tar") and not hidden and not is_folder:
            found.append(name)
        elif COMPRESSED.search(name) and not hidden and not is_folder:
            compressed.append(name)
        else:
            left.add("folders" if is_folder else kind_of_file(name), name)
    return found, compressed, left


def scan(path: str | os.PathLike[str]) -> tuple[np.ndarray, LeftOut]:
    """Where the examples of an archive lie, and the files that are of none: int64 [n, 9], the columns from `IMAGE` on;
    `ABSENT` is what is not there, `AGAIN` is 1 where the name is that of an earlier example, `TESTS` where its folder
    is named for tests.

    Raises tarfile.TarError or EOFError for what is no whole archive.
    """
    left = LeftOut()
    examples = _Examples(left)
    for name, *place in _files(path, left):
        folder, _, base = name.rpartition("/")
        if is_system_file(base) or any(map(is_system_folder, folder.split("/"))):
            continue
        if base.startswith(".") or ending_of(base)[1:] not in (*IMAGES, *TEXTS):
            left.add(kind_of_file(base), name)
        else:
            examples.add(name, *place)
    return np.array(examples.close(), np.int64).reshape(-1, HEADER), left


class _Examples:
    """Rows of examples, made of files that follow each other and have one name up to its first dot.

    Where no file is called `<name>.<ending>`, names may have dots: `IMG.2021.01.jpg` and `IMG.2021.01.txt` are one
    example. Beside such a file, those with more than one ending (`1.jpg`, `1.seg.png`) are left out.

    An image and a text with one name that lie apart are an example, too, if the archive has no other files of that
    name without their partner, a JSON file beside the text file aside: `tar` stores a folder in no order unless it is
    asked to sort.
    """

    def __init__(self, left: LeftOut):
        self._left, self._rows = left, []
        self._names: dict[int, int] = {}  # place in the rows by hash; ABSENT for a name that is there again
        self._alone: dict[str, list[tuple[str, str, list[int]]]] = {}  # kind, file and row, by name without ending
        self._key: tuple[str, str] | None = None
        self._parts: dict[str, tuple[list[int], dict[str, int], list[str]]] = {}  # row, ranks and names

    def add(self, name: str, start: int, size: int, header: int) -> None:
        folder, slash, base = name.rpartition("/")
        folder += slash
        stem, _, endings = base.partition(".")
        middle, _, ending = endings.lower().rpartition(".")
        if self._key != (folder, stem):
            self._close_group()
            self._key = folder, stem
        new = [ABSENT, 0, ABSENT, 0, 0, 1, 0, int(is_for_tests(folder)), header]
        row, ranks, names = self._parts.setdefault(middle, (new, {}, []))
        kind, rank = ("image", 0) if ending in IMAGES else ("text", TEXTS.index(ending))
        if rank >= ranks.get(kind, len(TEXTS)):
            if kind == "image" or rank == ranks[kind]:
                self._left.add(f"second {kind}s of an example", name)
            return  # or a text that another one goes before
        ranks[kind] = rank
        names.append(name)
        column = IMAGE - 1 if kind == "image" else TEXT - 1
        row[column : column + 2] = start, size
        if kind == "image":
            row[HEADER - 1] = header
        if kind == "text":
            row[IS_JSON - 1] = int(ending == "json")
        row[NAMED - 1] &= not name.startswith("/") and ".." not in name.split("/")

    def _close_group(self) -> None:
        """No file of this name follows."""
        for middle, (row, ranks, names) in self._parts.items():
            folder, stem = self._key
            name = f"{folder}{stem}.{middle}" if middle else folder + stem
            if len(ranks) == 2 and (middle == "" or "" not in self._parts):
                row[AGAIN - 1] = int(hash(name) in self._names)
                self._names[hash(name)] = ABSENT if row[AGAIN - 1] else len(self._rows)
                self._rows.append(row)
            elif middle == "" or "" not in self._parts:
                self._alone.setdefault(name, []).append((*ranks, names[0], row))
            else:
                self._left.add("with more than one ending", names[0], len(names))
        self._parts = {}

    def close(self) -> list[list[int]]:
        """The rows in the order of their images, when no file follows."""
        self._close_group()
        for name, found in self._alone.items():
            parts = _with_text_file(found)
            rows = {kind: row for kind, _, row in parts}
            if len(parts) == len(rows) == 2:
                image, text = rows["image"], rows["text"]
                named = image[NAMED - 1] & text[NAMED - 1]
                again = int(hash(name) in self._names)
                self._rows.append([*image[: TEXT - 1], *text[TEXT - 1 : NAMED - 1], named, again, *image[TESTS - 1 :]])
            elif len(parts) == 1 and self._is_other_text(name, *parts[0]):
                continue
            elif "." in name.rpartition("/")[2]:
                for _, file, _ in parts:
                    self._left.add("with more than one ending", file)
            else:
                self._rows += [row for _, _, row in parts]
        return sorted(self._rows, key=lambda row: row[HEADER - 1])

    def _is_other_text(self, name: str, kind: str, file: str, text: list[int]) -> bool:
        """Whether a file alone is the text or JSON file of an example that has the other; the text file is read."""
        place = self._names.get(hash(name), ABSENT)
        if kind != "text" or place == ABSENT or text[IS_JSON - 1] == self._rows[place][IS_JSON - 1]:
            return False
        if not text[IS_JSON - 1]:
            self._rows[place][TEXT - 1 : NAMED - 1] = text[TEXT - 1 : NAMED - 1]
        return True


def _with_text_file(parts: list[tuple[str, str, list[int]]]) -> list[tuple[str, str, list[int]]]:
    """Of an image, a text file and a JSON file of one name the image and the text file; of others all."""
    plain = [part for part in parts if not part[2][IS_JSON - 1]]
    return plain if len(parts) == 3 and sorted(kind for kind, *_ in plain) == ["image", "text"] else parts


def _files(path: str | os.PathLike[str], left: LeftOut) -> Iterator[tuple[str, int, int, int]]:
    """Name, start, size and place of the header of the files of an archive, in their order; links are the files that
    they name."""
    places = None
    for entry in _entries(path):
        name = entry.name.removeprefix("./")
        if _plain(entry):
            yield name, entry.offset_data, entry.size, entry.offset
        elif entry.islnk() or entry.issym():
            places = _linked(path) if places is None else places
            if (place := places.get(_target(entry))) is not None:
                yield name, *place, entry.offset
            else:
                left.add("links to what is not in the archive", name)
        elif not entry.isdir() and entry.type != DUMPED_FOLDER:
            kind = "devices and pipes" if entry.isdev() else "members of an unknown kind"
            left.add("sparse files" if entry.isreg() else kind, name)


def _linked(path: str | os.PathLike[str]) -> dict[str, tuple[int, int]]:
    """Start and size of the files that the links of an archive name."""
    names = {_target(entry) for entry in _entries(path) if entry.islnk() or entry.issym()}
    files = ((posixpath.normpath(entry.name), entry) for entry in _entries(path) if _plain(entry))
    return {name: (entry.offset_data, entry.size) for name, entry in files if name in names}


def _target(entry: tarfile.TarInfo) -> str:
    folder = posixpath.dirname(entry.name) if entry.issym() else ""  # a hard link's name is whole
    return posixpath.normpath(posixpath.join(folder, entry.linkname))


def _plain(entry: tarfile.TarInfo) -> bool:
    return entry.isreg() and not entry.issparse()


class _Entry(tarfile.TarInfo):
    """A file of an archive. In incremental archives of GNU tar, times lie where others have the beginning of a name,
    which Python's reader puts before it."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        """See `tarfile.TarInfo`."""
        entry = super().frombuf(buf, encoding, errors)
        if buf[257:265] == tarfile.GNU_MAGIC and entry.type not in tarfile.GNU_TYPES:
            name = tarfile.nts(buf[:100], encoding, errors)
            entry.name = name.rstrip("/") if entry.isdir() else name
        return entry


def _entries(path: str | os.PathLike[str]) -> Iterator[tarfile.TarInfo]:
    """What an archive has, in its order."""
    with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:", tarinfo=_Entry) as archive:
        size, last = os.fstat(file.fileno()).st_size, -1
        while (entry := archive.next()) is not None:
            archive.members.clear()  # or all names are kept
            end = archive.offset if entry.issparse() else entry.offset_data + max(entry.size, -1)
            if not last < entry.offset < end <= size:
                raise tarfile.ReadError("it is cut off or damaged")
            last = entry.offset
            yield entry
        file.seek(archive.offset)
        end = file.read(tarfile.BLOCKSIZE)
        if len(end) < tarfile.BLOCKSIZE or any(end):
            raise tarfile.ReadError("its end is missing or damaged")
        while block := file.read(1 << 20):
            if any(block):
                raise tarfile.ReadError("it goes on after its end, as two archives in one file do")
