"""Writes safetensors, tensor by tensor and in several files where they would be large, in the memory of one block.

The layout is that of Hugging Face: `model.safetensors`, or `model-00001-of-00003.safetensors` and so on with
`model.safetensors.index.json` (`common/files/safetensors.py` reads both).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from etils import epath

from src.common.files.safetensors import DTYPES
from src.common.files.store import is_remote, write_whole

SHARD_BYTES = 5_000_000_000
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}


class Tensor(NamedTuple):
    """One tensor to be written; every call of `pieces` yields its elements in C order, in arrays of any shape."""

    dtype: np.dtype
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def size(self) -> int:
        """In bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_tensors(
    folder: str | os.PathLike[str], tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Writes tensors into a folder (local or in a store), at most `shard_bytes` a file unless one alone has more.

    Returns the names of the files. Each is whole or not there. Raises OSError, before anything is written where the
    disk has not the room, or what the store's client raises; ValueError where a tensor's pieces are not all of it.
    """
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    total = sum(tensor.size for tensor in tensors.values())
    check_room(target, total)
    files = _shared_out(tensors, shard_bytes)
    for name, members in files.items():
        _write_file(target / name, {member: tensors[member] for member in members})
    if len(files) == 1:
        return list(files)
    table = {member: name for name, members in files.items() for member in members}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(table.items()))}
    write_whole(target / "model.safetensors.index.json", (json.dumps(index, indent=2) + "\n").encode())
    return [*files, "model.safetensors.index.json"]


def check_room(folder: epath.Path, size: int) -> None:
    """Raises OSError when a local disk has less than `size` bytes left."""
    if not is_remote(folder) and (free := shutil.disk_usage(folder).free) < size:
        raise OSError(f"the disk of {folder} has {free / 1e9:.3g} GB left and {size / 1e9:.3g} are needed: make room")


def _shared_out(tensors: Mapping[str, Tensor], most: int) -> dict[str, list[str]]:
    """Names of files and of their tensors, in the given order."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.size > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.size
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05}-of-{len(groups):05}.safetensors": names for i, names in enumerate(groups, 1)}


def _write_file(target: epath.Path, tensors: Mapping[str, Tensor]) -> None:
    # Wide elements first, so that all of them lie at multiples of their size.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    if is_remote(target):
        with tempfile.TemporaryDirectory() as near:
            draft = epath.Path(near) / target.name
            with draft.open("wb") as file:
                _write(file, ordered)
            draft.copy(target, overwrite=True)
        return
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with draft.open("wb") as file:
            _write(file, ordered)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def _write(file: BinaryIO, tensors: Mapping[str, Tensor]) -> None:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers refuses files without it
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.size
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for name, tensor in tensors.items():
        written = 0
        for piece in tensor.pieces():
            data = np.ascontiguousarray(piece, tensor.dtype)
            file.write(data.view(np.uint8).reshape(-1).data)
            written += data.nbytes
        if written != tensor.size:
            raise ValueError(f"the tensor {name} came with {written:,} bytes of {tensor.size:,}")
