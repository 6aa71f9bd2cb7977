"""The folder that a run starts from (`config.init_from`): our leaves as safetensors, and `weights.json` about them.

`weights.json` has `format`, `hash`, `about` (the fields of a config that the weights were made for, by dotted name, see
`about.py`), `published` (the config.json that they came with) and, of each leaf by path, dtype, shape and `print`, the
checksum of `common/files/checksums.py`. The hash is that of all of this and so of the weights: it does not
depend on how many files they are in. It finds damage and other weights; it is no signature.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from src.common.files.checksums import Running
from src.common.files.lazy_arrays import Leaves, is_stacked
from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.safetensors_writer import SHARD_BYTES, Tensor, write_tensors
from src.common.files.store import check_store, write_whole
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.models.pretrained.about import renamed
from src.models.pretrained.old_paths import path_now

FILE = "weights.json"
FORMAT = 2  # 1: before fields were rows of a table
HEAD = {"format": int, "hash": str, "about": dict, "published": dict, "leaves": dict}


def write_initial(
    folder: str | os.PathLike[str],
    leaves: Leaves,
    about: Mapping[str, Any],
    published: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> str:
    """Writes leaves into a folder (local or in a store), a block at a time, and returns their hash.

    `weights.json` comes last, so that a folder with it is whole. Raises OSError, or what the store's client raises.
    """
    running: dict[str, Running] = {}

    def tensor(path: str) -> Tensor:
        def pieces() -> Iterator[np.ndarray]:
            running[path] = Running()
            for block in leaves.blocks(path):
                piece = np.ascontiguousarray(block, shape.dtype)
                running[path].add(piece)
                yield piece

        shape = leaves.shapes[path]
        return Tensor(np.dtype(shape.dtype), tuple(shape.shape), pieces)

    write_tensors(folder, {path: tensor(path) for path in sorted(leaves.shapes)}, shard_bytes)
    table = {
        path: {"dtype": np.dtype(shape.dtype).name, "shape": list(shape.shape), "print": running[path].value()}
        for path, shape in leaves.shapes.items()
    }
    meta = {"format": FORMAT, "about": dict(about), "published": dict(published or {}), "leaves": table}
    meta["hash"] = seal(meta)
    write_whole(epath.Path(folder) / FILE, (json.dumps(meta, indent=1, sort_keys=True) + "\n").encode())
    return meta["hash"]


def seal(meta: Mapping[str, Any]) -> str:
    """The hash of the model and its leaves in `weights.json`; their origin does not count."""
    text = json.dumps([meta["format"], meta["about"], meta["leaves"]], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def is_initial(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder is one that `write_initial` wrote."""
    return (epath.Path(folder) / FILE).exists()


def read_meta(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """`weights.json` of a folder, checked against its own hash; reads nothing else.

    Of format 1 it is as if format 2 had been written; `moved` has the path then of each leaf by its path now.

    Raises FileNotFoundError, OSError, and ValueError, in one sentence, when it is damaged or of a newer format.
    """
    check_store(folder)
    path = epath.Path(folder) / FILE
    where = f"the initial weights {shown(folder)}"
    if not path.exists():
        if not epath.Path(folder).exists():
            raise FileNotFoundError(f"{where} do not exist: correct the path")
        raise FileNotFoundError(
            f"{where} have no {FILE}: give a folder that python -m src.tools.convert made; it also converts published "
            "checkpoints"
        )
    meta = read_json(path, what="file")
    if isinstance(meta, dict) and isinstance(meta.get("format"), int) and meta["format"] > FORMAT:
        raise ValueError(f"{where} have format {meta['format']}, read are formats up to {FORMAT}: use a later version")
    if not isinstance(meta, dict) or any(type(meta.get(name)) is not kind for name, kind in HEAD.items()):
        raise ValueError(f"{where} have a {FILE} that is not what was written: convert them anew")
    if meta["format"] < 1 or seal(meta) != meta["hash"]:
        raise ValueError(f"{where} have a {FILE} whose hash is not that of its content: convert them anew")
    return meta | {"moved": {}} if meta["format"] == FORMAT else _from_1(meta)


def _from_1(meta: Mapping[str, Any]) -> dict[str, Any]:
    """`weights.json` of format 1 in format 2; the hash stays that of the file."""
    moved = {path_now(path): path for path in meta["leaves"]}
    leaves = {now: meta["leaves"][then] for now, then in moved.items()}
    told = renamed(meta["about"], meta["published"])
    return dict(meta) | {"format": FORMAT, "about": told, "leaves": leaves, "moved": moved}


class Initial:
    """The weights in such a folder as `Leaves`, with `meta`, which has its `hash`.

    Raises as `read_meta` and `SafeTensors` do, and ValueError when the tensors are not those of `weights.json`.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder, self.meta = epath.Path(folder), read_meta(folder)
        self.tensors = SafeTensors(folder)
        table, self._moved = self.meta["leaves"], self.meta["moved"]
        now = {then: path for path, then in self._moved.items()}
        entries = {now.get(name, name): entry for name, entry in self.tensors.entries.items()}
        have = {p: {"dtype": e.dtype.name, "shape": list(e.shape)} for p, e in entries.items()}
        told = {p: leaf for p, leaf in table.items() if isinstance(leaf, dict)}
        wrong = sorted(
            path
            for path in {*have, *table}
            if path not in have or {k: v for k, v in told.get(path, {}).items() if k != "print"} != have[path]
        )
        if wrong:
            raise ValueError(
                f"the initial weights {shown(folder)} do not have the tensors of their {FILE}, which differs in "
                f"{listed(list(map(shown, wrong)), 100)}: convert them anew"
            )
        self.shapes = {p: jax.ShapeDtypeStruct(e.shape, e.dtype) for p, e in entries.items()}

    @property
    def hash(self) -> str:
        """Of the weights."""
        return self.meta["hash"]

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`."""
        name = self._moved.get(path, path)
        for block in self.tensors[name] if is_stacked(path) else [self.tensors[name]]:
            yield block
            self.tensors.release(name)

    def check(self, prints: Mapping[str, int]) -> None:
        """Raises ValueError unless these are the checksums of the leaves as they were written."""
        wrong = sorted(path for path, value in prints.items() if value != self.meta["leaves"][path].get("print"))
        if wrong:
            raise ValueError(
                f"the initial weights {shown(self.folder)} are damaged: {listed(wrong)} came otherwise than they were "
                "written; convert or copy them anew"
            )


def summary(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """Number of parameters, bytes, and parameters by dtype, of arrays or abstract arrays by name."""
    kinds: dict[str, int] = {}
    for leaf in shapes.values():
        name = np.dtype(leaf.dtype).name
        kinds[name] = kinds.get(name, 0) + math.prod(leaf.shape)
    size = sum(count * jax.numpy.dtype(name).itemsize for name, count in kinds.items())
    return {"parameters": sum(kinds.values()), "bytes": size, "dtypes": kinds}
