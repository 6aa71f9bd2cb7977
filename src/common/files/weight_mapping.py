"""Weights in published layouts: names of tensors <-> leaves by path, compared as a whole before any data are read.

PyTorch keeps linear kernels as `[out, in]` and those of convolutions as `[out, in, rows, columns]`; here they are
`[in, out]` and `[rows, columns, in, out]`. Other leaves are the same on both sides.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from src.common.files.paths import shown
from src.common.files.safetensors import SafeTensors
from src.common.files.store import write_whole
from src.common.tree import flatten, listed, rebuild

# Of each leaf the tensor that has it, or those of its blocks, which lie along the leaf's first axis.
Names = Mapping[str, str | tuple[str, ...]]
FLOATS = ("float64", "float32", "float16", "bfloat16")


def import_weights(
    tensors: SafeTensors, names: Names, like: Any, canonical: Callable[[str], str | None] = lambda name: name
) -> Any:
    """Published tensors as a tree like `like` (arrays or abstract arrays), in its dtypes.

    `canonical` turns older names into those of `names`, and what is not wanted into None. Nothing is read before
    everything fits; then one leaf at a time is.

    Raises ValueError, in one sentence that lists every tensor that is missing, extra, there under two names, of another
    shape, or not floating point.
    """
    leaves = flatten(like)
    wanted = {name: shape for path, leaf in leaves.items() for name, shape in _published(path, leaf.shape, names)}
    found: dict[str, str] = {}
    wrong = []
    for name in tensors.entries:
        known = canonical(name)
        if known is None:
            continue
        if known in found:
            wrong.append(f"{shown(name)} is {shown(found[known])} once more")
        elif known not in wanted:
            wrong.append(f"{shown(name)} is not in this model")
        found.setdefault(known, name)
    wrong += [f"{name} is missing" for name in wanted if name not in found]
    for known, name in found.items():
        entry = tensors.entries[name]
        if known in wanted and entry.shape != wanted[known]:
            wrong.append(f"{shown(name)} has shape {list(entry.shape)}, the model {list(wanted[known])}")
        elif known in wanted and entry.dtype.name not in FLOATS:
            wrong.append(f"{shown(name)} is {entry.dtype.name}, no float of 16 bits or more")
    if wrong:
        raise ValueError(f"the weights {shown(tensors.path)} do not fit their config: {listed(wrong, 100)}")

    def read(path: str, leaf: Any) -> jax.Array:
        parts = names[path]
        kernel = path.endswith("kernel")
        if isinstance(parts, str):
            value = np.asarray(_inward(tensors[found[parts]], kernel), leaf.dtype)
        else:
            value = np.stack([np.asarray(_inward(tensors[found[n]], kernel), leaf.dtype) for n in parts])
        return jnp.array(value)  # copied, because on a CPU `asarray` would keep a mapped file in use

    return rebuild({path: read(path, leaf) for path, leaf in leaves.items()}, like)


def export_weights(params: Any, names: Names) -> dict[str, np.ndarray]:
    """The leaves under their published names and in the published order of axes: the inverse of `import_weights`."""
    out: dict[str, np.ndarray] = {}
    for path, leaf in flatten(params).items():
        value, kernel = np.asarray(jax.device_get(leaf)), path.endswith("kernel")
        if isinstance(names[path], str):
            out[names[path]] = _outward(value, kernel)
        else:
            out |= {name: _outward(part, kernel) for name, part in zip(names[path], value, strict=True)}
    return out


def write_weights(
    folder: str | os.PathLike[str], file: str, tensors: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> None:
    """Writes `file` (safetensors) and config.json into a folder (local or in a store), each whole or not at all.

    Raises OSError, or what the store's client raises.
    """
    from safetensors.numpy import save

    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / file, save(dict(tensors), metadata={"format": "pt"}))
    write_whole(target / "config.json", (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def content_hash(leaves: Mapping[str, Any], about: Mapping[str, Any]) -> str:
    """SHA-256 of arrays by path (names, dtypes, shapes, bits) and of `about`, JSON about them, as hexadecimals.

    It does not depend on files, sharding or the order of the leaves.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for path in sorted(leaves):
        value = np.ascontiguousarray(jax.device_get(leaves[path]))
        digest.update(json.dumps([path, value.dtype.name, value.shape]).encode())
        digest.update(value.view(np.uint8).reshape(-1).data)
    return digest.hexdigest()


def _published(path: str, shape: tuple[int, ...], names: Names) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors of a leaf."""
    parts = names[path]
    blocks, shape = ((parts,), shape) if isinstance(parts, str) else (parts, shape[1:])
    if path.endswith("kernel"):
        shape = shape[::-1] if len(shape) == 2 else (shape[3], shape[2], shape[0], shape[1])
    return [(name, tuple(shape)) for name in blocks]


def _inward(tensor: np.ndarray, kernel: bool) -> np.ndarray:
    if not kernel:
        return tensor
    return tensor.T if tensor.ndim == 2 else tensor.transpose(2, 3, 1, 0)


def _outward(leaf: np.ndarray, kernel: bool) -> np.ndarray:
    if kernel:
        leaf = leaf.T if leaf.ndim == 2 else leaf.transpose(3, 2, 0, 1)
    return np.ascontiguousarray(leaf)
