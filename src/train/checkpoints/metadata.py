"""Metadata of a checkpoint: its format, the seal over it, and a fingerprint for every leaf.

`meta` is JSON: format, version of this framework, step, config, a checksum of `data`, for each leaf its fingerprint,
dtype and shape, and the seal, a checksum of all of this. All formats have the seal, to distinguish damage from a newer
format.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array

from src.common import tree
from src.common.files.checksums import fingerprints
from src.common.files.paths import shown
from src.common.files.strict_json import read_json
from src.train.checkpoints.config_changes import plain
from src.train.checkpoints.integrity import DamageError, check_marker, check_plain, on_all_processes
from src.train.checkpoints.migrations import MIGRATIONS

FORMAT = 3
VERSION = "0.1.0"  # of this framework, as in CHANGELOG.md

META = {"format": int, "step": int, "config": dict, "data": int, "leaves": dict}
ITEMS = ("state", "data", "meta")

Found = tuple[Any, Any, dict[str, Any]]  # state, data state, meta


def read(folder: epath.Path, abstract_state: Any, accept: Callable[[Any], Any] | None) -> Found:
    """Reads and verifies a checkpoint: marker, kinds of files, seal, data, config, then dtype, shape and
    bits of every leaf.

    Raises DamageError for a damaged one, and ValueError for one of another run.
    """
    import orbax.checkpoint as ocp

    # Readers of single items, since the manager's wait for other processes, which may have found damage.
    on_all_processes("", lambda: check_marker(folder, ITEMS))
    on_all_processes("", lambda: check_plain(folder))
    meta = on_all_processes("meta", lambda: checked_meta(read_item(folder / "meta")))
    check_format(meta, str(folder))
    data = on_all_processes("data", lambda: checked_data(read_item(folder / "data"), meta))
    saved = meta, data
    meta, data = on_all_processes("meta", lambda: migrated(*saved))
    if accept is not None:
        accept(meta["config"])
    wanted = {path: target(leaf) for path, leaf in tree.flatten(abstract_state).items()}
    new = {path: wanted.pop(path) for path in meta.get("fill", ()) if path in wanted}
    check_leaves(meta["leaves"], wanted, str(folder))
    moved = meta.get("moved", {})  # path now -> path then
    targets = tree.unflatten({moved.get(path, path): leaf for path, leaf in wanted.items()})
    restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), targets)
    args, reader = ocp.args.PyTreeRestore(targets, restore_args=restore_args), ocp.PyTreeCheckpointHandler()
    found = on_all_processes("state", lambda: tree.flatten(reader.restore(folder / "state", args=args)))
    now = {moved.get(path, path): path for path in wanted}
    flat = {now.get(then, then): leaf for then, leaf in found.items()}
    check_values(meta["leaves"], flat)
    filled = {path: np.full(leaf.shape, meta["fill"][path], leaf.dtype) for path, leaf in new.items()}
    flat |= {path: jax.device_put(value, new[path].sharding) for path, value in filled.items()}
    return tree.rebuild(flat, abstract_state), data["value"], meta


def describe(step: int, flat: Mapping[str, Array], data_state: Any, config: Any) -> tuple[dict, dict]:
    """`meta` and `data` of a checkpoint with the leaves `flat`, both as JSON values."""
    prints = fingerprints(flat)
    leaves = {k: {"print": prints[k], "dtype": str(x.dtype), "shape": list(x.shape)} for k, x in flat.items()}
    data = {"value": plain(data_state)}
    meta = {"format": FORMAT, "version": VERSION, "step": int(step), "config": plain(config)}
    meta |= {"data": checksum(data), "leaves": leaves}
    return meta | {"seal": checksum(meta)}, data


def read_item(folder: epath.Path) -> Any:
    """A JSON item, of limited size and depth; a config may contain infinity."""
    return read_json(folder / "metadata", finite=False)


def checked_meta(meta: Any) -> dict[str, Any]:
    """`meta` itself. Raises DamageError for a wrong seal or a missing format."""
    if not isinstance(meta, dict) or meta.get("seal") != checksum({k: v for k, v in meta.items() if k != "seal"}):
        raise DamageError("wrong checksum")
    if not isinstance(meta.get("format"), int) or meta["format"] < 0:
        raise DamageError("it has no format")
    return meta


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, dict) and {"print", "dtype", "shape"} <= leaf.keys()


def checked_data(data: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    """`data` itself. Raises DamageError unless it has the checksum in `meta`."""
    if not isinstance(data, dict) or meta["data"] != checksum(data):
        raise DamageError("wrong checksum")
    return data


def migrated(meta: dict[str, Any], data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`meta` and `data` in the present format, converted by MIGRATIONS one format at a time; writes nothing.

    Raises DamageError unless the result has the types that this version writes.
    """
    meta = {name: value for name, value in meta.items() if name not in ("fill", "moved")}  # only migrations set these
    while meta["format"] < FORMAT:
        number = meta["format"]
        meta, data = MIGRATIONS[number](meta, data)
        meta = meta | {"format": number + 1}
    # The seal is a checksum, not a signature: in an untrusted file it may be valid for any contents.
    wrong = [name for name, kind in META.items() if not isinstance(meta.get(name), kind)]
    wrong = wrong or [path for path, leaf in meta["leaves"].items() if not _is_leaf(leaf)]
    wrong += [] if "value" in data else ["value"]
    if wrong:
        raise DamageError(f"{tree.listed(list(map(shown, wrong)))} has another type than this version writes")
    return meta, data


def check_format(meta: Mapping[str, Any], where: str) -> None:
    """Raises ValueError when `migrated` could not read this format."""
    number, version = meta["format"], meta.get("version", "unknown")
    if number > FORMAT:
        raise ValueError(
            f"{where} has format {number}, written by version {version} of this framework, and this version ({VERSION})"
            f" reads formats up to {FORMAT}: use version {version} or a later one"
        )
    if missing := [i for i in range(number, FORMAT) if i not in MIGRATIONS]:
        raise ValueError(
            f"{where} has format {number}, written by version {version} of this framework, and this version ({VERSION})"
            f" cannot read format {missing[0]}: use version {version}"
        )


def arrays(state: Any) -> dict[str, Array]:
    """The leaves of a state by path. Raises TypeError when one is a random key."""
    flat = {path: jnp.asarray(leaf) for path, leaf in tree.flatten(state).items()}
    keys = [path for path, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    if keys:
        raise TypeError(
            f"the state holds random keys ({tree.listed(keys)}): derive them from the seed and step instead"
        )
    return flat


def target(leaf: Any) -> jax.ShapeDtypeStruct:
    """Shape, dtype and sharding of a leaf to read."""
    # Without a sharding, Orbax would need the devices that saved the leaf.
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def check_leaves(saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str) -> None:
    """Raises ValueError, with the differences, unless the checkpoint has the leaves of `wanted`."""
    rows = []
    for path in sorted(saved.keys() | wanted.keys()):
        was = f"{saved[path]['dtype']}{saved[path]['shape']}" if path in saved else "absent"
        now = f"{wanted[path].dtype}{list(wanted[path].shape)}" if path in wanted else "absent"
        if was != now:
            rows.append(f"{path}: {was} -> {now}")
    if rows:
        raise ValueError(
            f"{where} has another architecture or optimizer, {len(rows)} leaves differ (checkpoint -> this run):"
            f" {tree.listed(rows)}; use the config that made it, or another --workdir"
        )


def check_values(saved: Mapping[str, Any], flat: Mapping[str, Array]) -> None:
    """Raises DamageError, with the first difference, unless all leaves have the saved shapes and fingerprints."""
    if set(flat) != set(saved):
        raise DamageError("state: leaves are missing")
    for path, value in flat.items():
        if [str(value.dtype), list(value.shape)] != [saved[path]["dtype"], saved[path]["shape"]]:
            raise DamageError(f"state: the leaf {path} has another shape or dtype than was saved")
    for path, value in fingerprints(flat).items():
        if value != saved[path]["print"]:
            raise DamageError(f"state: the leaf {path} has a wrong fingerprint")


def checksum(value: Any) -> int:
    """CRC-32 of a JSON value with sorted keys."""
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
