"""Arrays in untrusted `.npy` files: numbers only, and as many as the file has."""

from __future__ import annotations

import math
import os
import stat
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from src.common.files.paths import shown

HEADER = 4096  # bytes; a header of numbers takes 128
KINDS = "biufc"
LARGEST = 2**56  # elements; zeros left out, as numpy counts


def read_npy(path: str | os.PathLike[str], *, mapped: bool = False) -> np.ndarray:
    """The array of a local `.npy` file (format 1 or 2), memory-mapped and read-only if `mapped`.

    The shape is compared with the file's size before anything is allocated. Nothing is unpickled. Raises
    FileNotFoundError, and ValueError, in one sentence, when the file is an archive (`.npz`) or pickle, is damaged,
    holds something else than numbers, or is longer or shorter than by its header.
    """
    where = f"the array file {shown(os.fspath(path))}"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait for its other end
            raise ValueError("it is not a plain file")
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            shape, fortran, dtype = read_header(file)
            start = file.tell()
            count = math.prod(shape)
            if count * dtype.itemsize != status.st_size - start:
                raise ValueError(
                    f"it has {status.st_size - start:,} bytes of numbers where {dtype} {shown(list(shape))} takes "
                    f"{count * dtype.itemsize:,}"
                )
            # Nothing cannot be mapped.
            flat = np.memmap(file, dtype, "r", start, count) if mapped and count else np.fromfile(file, dtype, count)
            return flat.reshape(shape, order="F" if fortran else "C")
    except FileNotFoundError:
        raise FileNotFoundError(f"{where} does not exist: correct the path") from None
    except (ValueError, OSError) as error:
        raise ValueError(f"{where} cannot be read as a numpy array, write it anew with numpy.save ({error})") from error


def read_header(file: BinaryIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether columns come first, and dtype of the array that begins in `file`, which is left behind the header.

    Raises ValueError for what is no array of numbers.
    """
    magic = file.read(8)
    if magic[:2] == b"PK":
        raise ValueError("it is an archive (.npz): save each array as a .npy file")
    if magic[:1] == b"\x80":
        raise ValueError("it is a pickle, which can run code and is never opened")
    if magic[:6] != b"\x93NUMPY" or magic[6:] not in (b"\x01\x00", b"\x02\x00"):
        raise ValueError("it does not begin as one, in format 1 or 2")
    read = npy.read_array_header_1_0 if magic[6] == 1 else npy.read_array_header_2_0
    start = file.tell()
    width = 2 if magic[6] == 1 else 4
    length = int.from_bytes(file.read(width), "little")
    if length > HEADER:
        raise ValueError(f"its header has {length:,} bytes, more than {HEADER:,}")
    file.seek(start)
    try:
        shape, fortran, dtype = read(file, max_header_size=HEADER)
    except Exception as error:  # numpy evaluates the header as a literal, which can fail in many ways
        raise ValueError(f"its header is damaged ({type(error).__name__})") from error
    if dtype.kind not in KINDS or dtype.names or dtype.shape:
        raise ValueError(f"it holds {shown(dtype)} and not numbers; pickled objects are never opened")
    if len(shape) > 32 or any(type(n) is not int or n < 0 for n in shape) or math.prod(n or 1 for n in shape) > LARGEST:
        raise ValueError(f"its shape {shown(shape)} is no shape")
    return shape, fortran, dtype
