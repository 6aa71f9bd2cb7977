"""Arrays in untrusted `.npz` archives: numbers only, whole or in blocks of rows."""

from __future__ import annotations

import contextlib
import math
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from src.common.files.npy import read_header
from src.common.files.paths import shown

ENDING = ".npy"
DAMAGE = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError)  # what zipfile raises
Header = tuple[tuple[int, ...], bool, np.dtype]  # shape, whether columns come first, dtype


class Npz:
    """The arrays of a local `.npz` by name. Nothing is unpickled, and nothing is read before it is asked for.

    Its methods raise ValueError, in one sentence, for what is no archive, is cut off or damaged, or holds something
    else than numbers; the first of all raises FileNotFoundError.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = os.fspath(path)
        if not os.path.exists(self.path):
            raise FileNotFoundError(f"the archive {shown(self.path)} does not exist: correct the path")
        with self._mended(), zipfile.ZipFile(self.path) as archive:
            entries = archive.infolist()
        self._entries = {e.filename.removesuffix(ENDING): e for e in entries if e.filename.endswith(ENDING)}

    def names(self) -> tuple[str, ...]:
        """The names of its arrays."""
        return tuple(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of an array."""
        with self._opened(name) as (_, (shape, _, _)):
            return shape

    def array(self, name: str) -> np.ndarray:
        """An array as a whole."""
        with self._opened(name) as (file, (shape, columns_first, dtype)):
            return _read(file, shape, dtype, "F" if columns_first else "C")

    def blocks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """An array [n, …] in blocks of `rows` rows, the last of which may be smaller."""
        with self._opened(name) as (file, (shape, columns_first, dtype)):
            if columns_first and len(shape) > 1:
                raise ValueError(f"{name} has its columns first: write it with numpy.ascontiguousarray")
            for start in range(0, shape[0], rows):
                yield _read(file, (min(rows, shape[0] - start), *shape[1:]), dtype, "C")

    @contextlib.contextmanager
    def _opened(self, name: str) -> Iterator[tuple[BinaryIO, Header]]:
        """The file of an array behind its header, and the header, which fits the file."""
        if name not in self._entries:
            have = ", ".join(self._entries) or "none"
            raise ValueError(f"the archive {shown(self.path)} has no array {name!r}; it has {have}")
        entry = self._entries[name]
        with self._mended(), zipfile.ZipFile(self.path) as archive, archive.open(entry) as file:
            shape, columns_first, dtype = read_header(file)
            have, wanted = entry.file_size - file.tell(), math.prod(shape) * dtype.itemsize
            if have != wanted:
                raise ValueError(f"{name} has {have:,} bytes where {dtype} {shown(list(shape))} takes {wanted:,}")
            yield file, (shape, columns_first, dtype)

    @contextlib.contextmanager
    def _mended(self) -> Iterator[None]:
        try:
            yield
        except DAMAGE as error:
            where = f"the archive {shown(self.path)} cannot be read as arrays, copy or write it anew"
            raise ValueError(f"{where} ({error})") from error


def _read(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype, order: str) -> np.ndarray:
    wanted = math.prod(shape) * dtype.itemsize
    data = file.read(wanted)
    if len(data) != wanted:
        raise EOFError("it ends too early")
    return np.frombuffer(data, dtype).reshape(shape, order=order)


def write_npz(
    path: str | os.PathLike[str], shapes: Mapping[str, tuple[tuple[int, ...], Any]], blocks: Callable[[str], Iterable]
) -> None:
    """An archive whose arrays come in blocks of rows, so that they need not fit into memory; whole or not at all.

    shapes   shape and dtype by name
    blocks   the blocks of an array
    """
    unfinished = f"{os.fspath(path)}.part"
    try:
        _write(unfinished, shapes, blocks)
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)


def _write(path: str, shapes: Mapping[str, tuple[tuple[int, ...], Any]], blocks: Callable[[str], Iterable]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (shape, dtype) in shapes.items():
            with archive.open(name + ENDING, "w", force_zip64=True) as file:
                about = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
                np.lib.format.write_array_header_1_0(file, about)
                for block in blocks(name):
                    file.write(np.ascontiguousarray(block, dtype).tobytes())
