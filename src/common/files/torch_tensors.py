"""Tensors in files of `torch.save`, without torch and without running code.

Such a file is a pickle, which can name any function to call. Only the few that build tensors and dictionaries are known
here; every other name is refused. Both forms are read: the archive (since torch 1.6) and the stream before it.
"""

from __future__ import annotations

import collections
import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from src.common.files.paths import shown

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
DTYPES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32, "ShortStorage": np.int16,
    "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip
DAMAGE = (pickle.UnpicklingError, zipfile.BadZipFile, EOFError, OSError, ValueError, TypeError, KeyError, IndexError,
          AttributeError, ImportError, OverflowError, RuntimeError, RecursionError)  # fmt: skip


def read_tensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of a saved `state_dict` by name; in nested dictionaries the names are joined by dots, and what is no
    tensor is left out.

    Raises FileNotFoundError, and ValueError, in one sentence, for a file that is damaged, holds no tensors, or names
    anything that could run code.
    """
    where = f"the file of tensors {shown(os.fspath(path))}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{where} does not exist: correct the path")
    try:
        with open(path, "rb") as file:
            archive = zipfile.is_zipfile(file)
            file.seek(0)
            found = _read_archive(file) if archive else _read_stream(file)
    except DAMAGE as error:
        raise ValueError(f"{where} cannot be read ({error or type(error).__name__}): download it again, or save its"
                         " tensors as safetensors") from error  # fmt: skip
    tensors = dict(_named(found, ""))
    if not tensors:
        raise ValueError(f"{where} holds no tensors by name: save the model's state_dict")
    return tensors


def _named(value: Any, prefix: str) -> Any:
    if isinstance(value, np.ndarray):
        yield prefix, value
    elif isinstance(value, Mapping):
        for name, each in value.items():
            yield from _named(each, f"{prefix}.{name}" if prefix else str(name))


class _Storage:
    """The type of a storage, as its pickle names it."""

    def __init__(self, name: str):
        self.dtype = np.dtype(DTYPES[name])


def _rebuild(storage: np.ndarray, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> np.ndarray:
    """A tensor, as a view of its storage. Raises ValueError where it does not lie inside."""
    numbers = (offset, *size, *stride)
    if len(size) != len(stride) or not all(type(n) is int and n >= 0 for n in numbers):
        raise ValueError(f"a tensor has the size {size} and the stride {stride}")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > len(storage) or (math.prod(size) and last >= len(storage)):
        raise ValueError("a tensor is longer than its storage")
    if not math.prod(size):
        return np.zeros(size, storage.dtype)
    steps = [step * storage.itemsize for step in stride]
    return np.lib.stride_tricks.as_strided(storage[offset:], size, steps, writeable=False)


def _parameter(tensor: np.ndarray, *_: Any) -> np.ndarray:
    return tensor


KNOWN: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild,
    ("torch._utils", "_rebuild_tensor"): _rebuild,
    ("torch._utils", "_rebuild_parameter"): _parameter,
}


class _Unpickler(pickle.Unpickler):
    """`load` gives the array of a storage: (type, key, elements)."""

    def __init__(self, file: BinaryIO, load: Callable[[np.dtype, str, int], np.ndarray]):
        super().__init__(file)
        self._load = load

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle may name; all else is refused."""
        if module == "torch" and name in DTYPES:
            return _Storage(name)
        if (module, name) in KNOWN:
            return KNOWN[module, name]
        raise pickle.UnpicklingError(f"it names {module}.{name}, which may run code")

    def persistent_load(self, pid: Any) -> np.ndarray:
        """A storage."""
        if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], _Storage):
            raise pickle.UnpicklingError("it refers to something else than a tensor's storage")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it has a storage that is a view of another")
        return self._load(pid[1].dtype, str(pid[2]), int(pid[4]))


def _read_archive(file: BinaryIO) -> Any:
    with zipfile.ZipFile(file) as archive:
        main = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
        if main is None:
            raise ValueError("it is an archive without data.pkl")
        folder, kept = main.removesuffix("data.pkl"), {}

        def load(dtype: np.dtype, key: str, count: int) -> np.ndarray:
            if key not in kept:
                kept[key] = np.frombuffer(archive.read(f"{folder}data/{key}"), dtype)
            if len(kept[key]) != count:
                raise ValueError(f"storage {key} has {len(kept[key])} numbers instead of {count}")
            return kept[key]

        return _Unpickler(io.BytesIO(archive.read(main)), load).load()


def _read_stream(file: BinaryIO) -> Any:
    """The storages stand behind the pickle: tensors are views of arrays that are filled at the end."""
    left, kept = os.fstat(file.fileno()).st_size, {}

    def keep(dtype: np.dtype, key: str, count: int) -> np.ndarray:
        nonlocal left
        if key not in kept:
            left -= count * dtype.itemsize
            if count < 0 or left < 0:
                raise ValueError("its storages are longer than the file")
            kept[key] = np.zeros(count, dtype)
        if kept[key].dtype != dtype or len(kept[key]) != count:
            raise ValueError(f"storage {key} is there in two forms")
        return kept[key]

    magic, version, _ = (_Unpickler(file, keep).load() for _ in range(3))
    if magic != MAGIC or version != PROTOCOL:
        raise ValueError("it is no file of torch.save, or of an unknown version")
    found = _Unpickler(file, keep).load()
    for key in _Unpickler(file, keep).load():
        target = kept[key]
        count = int.from_bytes(file.read(8), "little")
        data = file.read(target.nbytes)
        if count != len(target) or len(data) != target.nbytes:
            raise ValueError(f"storage {key} is cut off")
        target[:] = np.frombuffer(data, target.dtype)
    return found
