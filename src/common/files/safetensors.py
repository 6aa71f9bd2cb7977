"""Tensors of untrusted safetensors files: checked as a whole before anything of their size is allocated.

The format (github.com/huggingface/safetensors): 8 bytes, little-endian, with the length of the header; the header, a
JSON object `{name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}`; then the data,
where tensors lie without holes or overlaps. The library's own reader copies every tensor, has no 8-bit floats for numpy
and lets keys that are there twice and names with control characters pass; what is read here it reads alike (tested).
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
from etils import epath

from src.common.files.paths import inside, shown
from src.common.files.store import local_copy
from src.common.files.strict_json import parse_json, read_json
from src.common.tree import listed

HEADER = 8 << 20  # bytes; one of ten thousand tensors has about a million
NAME = 512  # characters
LARGEST = 2**56  # elements or bytes; zeros left out, as numpy counts
DTYPES: dict[str, Any] = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8, "BOOL": np.bool_,
}  # fmt: skip
FILES = ("model.safetensors", "model.safetensors.index.json")
FOREIGN = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".msgpack", ".h5", ".npz", ".npy")
CONVERT = (
    'convert it in its folder where torch is: python -c "import argparse, torch; '
    "from safetensors.torch import save_file; torch.serialization.add_safe_globals([argparse.Namespace]); "
    "read = torch.load('FILE', map_location='cpu', weights_only=True); read = read.get('ema', read); "
    "save_file({k: v.contiguous().clone() for k, v in read.items()}, 'model.safetensors')\""
)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of a header: `begin` and `end` count bytes from the start of the file."""

    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of a checkpoint by name: memory-mapped and read-only, nothing is read before it is used.

    `path` is a `.safetensors` file, a `.safetensors.index.json` that names the files beside it, or a folder, in which
    the first of `names` that is there is taken; files of a store are copied to the cache. `entries` has dtypes and
    shapes.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, for other formats (with the command that
    converts), damaged or contradictory headers, files that are not beside the index, and missing files and tensors.
    """

    def __init__(self, path: str | os.PathLike[str], names: Sequence[str] = FILES):
        self.path = epath.Path(path)
        self.entries: dict[str, Entry] = {}
        self._file_of: dict[str, os.PathLike[str]] = {}
        self._maps: dict[os.PathLike[str], mmap.mmap] = {}
        for file, wanted in _files(self.path, names).items():
            found = self._add(file)
            if wanted is None:
                continue
            if wanted != found:
                rows = [f"{shown(name)} is missing" for name in sorted(wanted - found)]
                rows += [f"{shown(name)} is not in the index" for name in sorted(found - wanted)]
                raise ValueError(f"{shown(file)} does not fit the index beside it: {listed(rows)}; fetch both anew")

    def _add(self, file: os.PathLike[str]) -> set[str]:
        local = local_copy(file)
        entries = read_header(local)
        self.entries |= entries
        self._file_of |= dict.fromkeys(entries, local)
        return set(entries)

    def __getitem__(self, name: str) -> np.ndarray:
        entry, file = self.entries[name], self._file_of[name]
        if file not in self._maps:
            with open(file, "rb") as opened:
                self._maps[file] = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        data = np.frombuffer(self._maps[file], np.uint8)[entry.begin : entry.end]
        return data.view(entry.dtype).reshape(entry.shape)

    def release(self, name: str) -> None:
        """Frees the memory of a tensor's pages. It stays readable, and is then read again."""
        entry, file = self.entries[name], self._file_of[name]
        if file in self._maps and entry.end > entry.begin and hasattr(mmap, "MADV_DONTNEED"):
            begin = entry.begin // mmap.PAGESIZE * mmap.PAGESIZE
            self._maps[file].madvise(mmap.MADV_DONTNEED, begin, entry.end - begin)

    def beside(self) -> list[str]:
        """Names of other files with weights in the folder, such as an adapter or a second checkpoint."""
        folder = self.path if self.path.is_dir() else self.path.parent
        read = {os.path.basename(file) for file in self._file_of.values()}
        names = sorted({path.name for path in folder.iterdir()} - read)
        return [name for name in names if name.lower().endswith((".safetensors", ".gguf", *FOREIGN))]

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def read_header(path: str | os.PathLike[str]) -> dict[str, Entry]:
    """The tensors of one local `.safetensors` file by name, in the order of their data; reads the header only.

    Raises FileNotFoundError, OSError, and ValueError in one sentence that names the file.
    """
    where = f"the checkpoint {shown(os.fspath(path))}"
    refuse_foreign(path)
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a plain file")
        with open(path, "rb") as file:
            first = file.read(8)
            length = int.from_bytes(first, "little")
            _check_start(first, length, status.st_size)
            header = parse_json(file.read(length), "its header", depth=4)
        return _entries(header, 8 + length, status.st_size)
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no checkpoint file {os.fspath(path)}; give the path of one") from None
    except ValueError as error:
        raise ValueError(f"{where} is not a sound safetensors file ({error}): fetch it anew") from error


def refuse_foreign(path: str | os.PathLike[str]) -> None:
    """Raises ValueError, with the command that converts, for the names of formats that are not opened here."""
    name = os.fspath(path)
    file = os.path.basename(name)
    wanted = "diffusion_pytorch_model" if file.startswith("diffusion_pytorch_model") else "model"
    if name.lower().removesuffix(".index.json").endswith(FOREIGN):
        raise ValueError(
            f"the checkpoint {shown(name)} is not opened, because such files may run code when they are loaded; "
            + CONVERT.replace("FILE", file if file.isprintable() else "FILE").replace("'model.", f"'{wanted}.")
        )


def _check_start(first: bytes, length: int, size: int) -> None:
    if len(first) == 8 and 2 <= length <= min(HEADER, size - 8):
        return  # though it may begin as another format: every 32nd header's length has the first byte of a pickle
    if first[:2] == b"PK" or first[:1] == b"\x80" or first[:6] == b"\x89HDF\r\n":
        raise ValueError(f"it begins as a zip, pickle or HDF5 file and not as one of tensors; {CONVERT}")
    if first.startswith(b"version "):
        raise ValueError("it is a Git LFS pointer")
    raise ValueError(f"it has {size:,} bytes and says its header has {length:,}; at most {HEADER:,} are read")


def _entries(header: Any, start: int, size: int) -> dict[str, Entry]:
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("its __metadata__ is no table of texts")
    entries = {name: _entry(name, value, start) for name, value in header.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: (item[1].begin, item[1].end)))
    at = start
    for name, entry in ordered.items():
        if entry.begin != at:
            raise ValueError(f"the data of {shown(name)} begin at byte {entry.begin:,} where {at:,} would be next")
        at = entry.end
    if at != size:
        raise ValueError(f"its tensors end at byte {at:,} and the file at {size:,}")
    return ordered


def _entry(name: str, value: Any, start: int) -> Entry:
    if not name or len(name) > NAME or not name.isprintable():
        raise ValueError(f"the name {shown(name)} is empty, longer than {NAME} characters or cannot be printed")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown(name)} has not just dtype, shape and data_offsets")
    kind, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{shown(name)} has dtype {shown(kind)}; read are {', '.join(DTYPES)}")
    shaped = _naturals(shape) and len(shape) <= 8 and math.prod(n or 1 for n in shape) <= LARGEST
    if not shaped or not _naturals(offsets) or len(offsets) != 2:
        raise ValueError(f"{shown(name)} has shape {shown(shape)} and data_offsets {shown(offsets)}")
    dtype = np.dtype(DTYPES[kind])
    if math.prod(shape) * dtype.itemsize != offsets[1] - offsets[0]:
        raise ValueError(f"{shown(name)} is {kind} {shown(shape)} and has {offsets[1] - offsets[0]:,} bytes")
    return Entry(dtype, tuple(shape), start + offsets[0], start + offsets[1])


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= LARGEST for n in value)


def _files(path: epath.Path, names: Sequence[str] = ()) -> dict[os.PathLike[str], set[str] | None]:
    """The files of a checkpoint, each with the tensors that it must have (None: whatever it has)."""
    refuse_foreign(path)
    if path.name.endswith(".json"):
        return _indexed(path)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"there is no checkpoint file {path}; give the path of a .safetensors file")
        return {path: None}
    for name in names:
        if (path / name).exists():
            return _files(path / name)
    found = sorted(file.name for file in path.iterdir())
    for name in found:
        refuse_foreign(path / name)
    raise FileNotFoundError(
        f"the folder {shown(path)} has none of {', '.join(names)} but {listed(list(map(shown, found))) or 'nothing'}: "
        "give the folder of the weights, or the path of a .safetensors file"
    )


def _indexed(path: epath.Path) -> dict[os.PathLike[str], set[str] | None]:
    index = read_json(path, what="index")
    table = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(table, dict) or not table or not all(isinstance(file, str) for file in table.values()):
        raise ValueError(f"the index {shown(path)} has no weight_map from names of tensors to files: fetch it anew")
    files: dict[str, set[str]] = {}
    for tensor, file in table.items():
        files.setdefault(file, set()).add(tensor)
    paths = {}
    for file, tensors in files.items():
        if "/" in file or not file.endswith(".safetensors"):
            raise ValueError(f"the index {shown(path)} names the file {shown(file)}: only .safetensors files beside it")
        paths[inside(path.parent, file)] = tensors
    if missing := [place.name for place in paths if not place.exists()]:
        raise FileNotFoundError(f"the index {shown(path)} names {listed(list(map(shown, missing)))}: fetch them too")
    return paths
