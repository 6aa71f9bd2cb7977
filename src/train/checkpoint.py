"""Checkpoints that are verified when they are read, behind one class; Orbax writes them (imported when needed).

One checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (the arrays, as nested dictionaries of
paths), `data` (JSON, where the input was) and `meta` (JSON: format version, config, and for each leaf its fingerprint,
dtype and shape). Orbax finds truncated files but restores flipped bits without a word, hence the fingerprints.

Several processes write one checkpoint together, each its own pieces, and make every decision together: what one of them
cannot read is damaged for all.
"""

from __future__ import annotations

import itertools
import json
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from etils import epath
from jaxtyping import Array

from src.common import tree
from src.common.distributed import agree, gather_texts
from src.common.files import is_remote, move_folder
from src.common.fingerprint import fingerprints
from src.common.inside import shown
from src.common.strict_json import read_json
from src.train.compatible import plain
from src.train.workdir import brief, check_writable

FORMAT = 1
META = {"format": int, "step": int, "config": dict, "data": int, "leaves": dict}


class DamageError(Exception):
    """A checkpoint that cannot be trusted, and why."""


class Checkpointer:
    """Saves and restores the train state of one run.

    `keep` checkpoints stay on disk; `every` only answers `due`. Raises OSError at once when `workdir` cannot be
    written, before anything expensive starts.
    """

    def __init__(self, workdir: str, keep: int = 3, every: int = 1000):
        if keep < 1:
            raise ValueError(f"checkpoint.keep must be at least 1, not {keep}")
        self.workdir = check_writable(workdir)
        self.directory = self.workdir / "checkpoints"
        self.keep, self.every = keep, every
        self._opened: Any = None
        self._pending: int | None = None
        self._failure: str | None = None
        self._error = ""

    def due(self, step: int) -> bool:
        """Whether `step` is a multiple of `every` (never when that is 0)."""
        return self.every > 0 and step > 0 and step % self.every == 0

    def latest_step(self) -> int | None:
        """The newest checkpoint, not yet verified and perhaps still being written, or None."""
        return max(self._steps(), default=None)

    def save(self, step: int, state: Any, data_state: Any, config: Any) -> bool:
        """Starts to write a checkpoint and returns; `state` may be donated to the next step right after.

        `data_state` and `config` are JSON values (a ConfigDict will do). Returns False where the step exists already
        or the write could not start. A write that fails (disk full) is logged at the next call, and `wait` raises if
        the last one failed.
        """
        import orbax.checkpoint as ocp

        jax.block_until_ready(state)
        self._settle()
        self._sweep()
        if step in self._steps():
            return False
        flat = _arrays(state)
        data = {"value": plain(data_state)}
        meta = {"format": FORMAT, "step": int(step), "config": plain(config)}
        meta |= {"data": _crc(data), "leaves": _leaves(flat)}
        meta["seal"] = _crc(meta)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree.unflatten(flat)), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        self._pending, reason = step, ""
        try:
            if not self._manager().save(step, args=items, force=True):
                reason = "Orbax declined to save"
        except Exception as error:
            reason = brief(error)
        return self._succeeded(reason)

    def restore(
        self, abstract_state: Any, accept: Callable[[Any], Any] | None = None
    ) -> tuple[Any, Any, dict[str, Any]] | None:
        """The newest sound checkpoint as (state, data_state, meta), or None when there is none at all.

        `abstract_state` is the state's tree with arrays or `ShapeDtypeStruct`s; their shardings are the result's (a
        leaf without one goes to the first local device), so the mesh may differ from the one that saved. A damaged
        checkpoint is named in a warning and the next older one is read; once that succeeded, the damaged ones are moved
        to `<workdir>/damaged`. `accept` gets the saved config first, and raises to refuse it (see `check_config`).

        Raises ValueError when the saved leaves are not those of `abstract_state`, and RuntimeError when every
        checkpoint is damaged. Nothing on disk is changed in either case.
        """
        self._settle()
        damaged: dict[int, str] = {}
        for step in sorted(self._steps(), reverse=True):
            try:
                found = self._read(step, abstract_state, accept)
            except DamageError as error:
                damaged[step] = str(error)
                logging.warning(
                    "Checkpoint %s is damaged (%s); trying the one before.", self.directory / str(step), error
                )
                continue
            self._set_aside(list(damaged))
            return found
        if damaged:
            listed = "; ".join(f"{self.directory / str(step)}: {why}" for step, why in damaged.items())
            raise RuntimeError(
                f"all {len(damaged)} checkpoints are damaged and the run will not silently start again from step 0"
                f" ({listed}): restore a copy, or choose another --workdir to start anew"
            )
        return None

    def finish(self) -> None:
        """Until this process is writing nothing, whatever the others do; `wait` raises if it failed."""
        if self._opened is None or self._pending is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._error = brief(error)

    def wait(self) -> None:
        """Until nothing is being written. Raises OSError when the last checkpoint could not be written."""
        self._settle()
        if self._failure:
            raise OSError(f"the last checkpoint was not written: {self._failure}; free space in {self.directory}")

    def close(self) -> None:
        """Waits as `wait` does (and raises as it does), then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            manager, self._opened = self._opened, None
            if manager is not None:
                manager.close()

    # ----------------------------------------------------------------------- within

    def _manager(self) -> Any:
        if self._opened is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(
                max_to_keep=self.keep,
                create=True,
                cleanup_tmp_directories=True,
                # Created in a thread, a directory that cannot be made leaves a process that never exits.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            )
            self._opened = ocp.CheckpointManager(self.directory, options=options)
        return self._opened

    def _steps(self) -> list[int]:
        # Nothing to ask Orbax (a slow import) in a folder that does not exist yet; processes must ask together.
        asked = self._opened or jax.process_count() > 1 or is_remote(self.directory)
        if not (asked or self.directory.exists()):  # of a store that does not answer, `exists` says no
            return []
        return json.loads(gather_texts(json.dumps(list(self._manager().all_steps())))[0])

    def _settle(self) -> None:
        """Waits for the write in flight and keeps its error for `wait`."""
        self.finish()
        reason, self._error = self._error, ""
        if self._pending is not None and self._succeeded(reason):
            self._pending = self._failure = None

    def _succeeded(self, reason: str) -> bool:
        """Whether no process has a reason why the pending step is not written; one that has fails it for all."""
        reason = agree(reason)
        if not reason:
            return True
        step, self._pending = self._pending, None
        self._failure = f"step {step}: {reason}"
        logging.error("Checkpoint %s; training goes on and the next save is tried.", self._failure)
        if self._opened is not None:
            self._opened.reload()  # Orbax counts the step as saved
        return False

    def _sweep(self) -> None:
        """Removes what a failed write left, to free the disk; only while nothing is being written."""
        if not self._failure or jax.process_index():
            return
        for rest in self.directory.glob("*.orbax-checkpoint-tmp*"):
            try:
                rest.rmtree()
            except Exception as error:  # a store's client has its own kinds
                logging.warning("Could not remove %s: %s", rest, brief(error))

    def _read(
        self, step: int, abstract_state: Any, accept: Callable[[Any], Any] | None
    ) -> tuple[Any, Any, dict[str, Any]]:
        import orbax.checkpoint as ocp

        # The items' own readers: those of the manager wait for the other processes, which may have met damage.
        folder = self.directory / str(step)
        meta = _together("meta", lambda: _check_seal(_read_item(folder / "meta")))
        if meta["format"] != FORMAT:
            raise ValueError(
                f"the checkpoint has format {meta['format']} and this version reads {FORMAT}: use the other version"
            )
        data = _together("data", lambda: _check_data(_read_item(folder / "data"), meta))
        if accept is not None:
            accept(meta["config"])
        wanted = {path: _target(leaf) for path, leaf in tree.flatten(abstract_state).items()}
        _check_leaves(meta["leaves"], wanted, str(folder))
        targets = tree.unflatten(wanted)
        restore_args = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), targets)
        args, reader = ocp.args.PyTreeRestore(targets, restore_args=restore_args), ocp.PyTreeCheckpointHandler()
        flat = _together("state", lambda: tree.flatten(reader.restore(folder / "state", args=args)))
        if set(flat) != set(wanted):
            raise DamageError("state: leaves are missing")
        for path, value in fingerprints(flat).items():
            if value != meta["leaves"][path]["print"]:
                raise DamageError(f"state: the leaf {path} is not what was saved")
        return tree.rebuild(flat, abstract_state), data["value"], meta

    def _set_aside(self, steps: list[int]) -> None:
        """Moves damaged checkpoints out of the way, so that the run can save those steps again."""
        if not steps:
            return
        reason = ""
        if jax.process_index() == 0:
            try:
                self._move(steps)
            except Exception as error:  # not only OSError: the others wait for the reason
                reason = brief(error)
        reason = agree(reason)  # the others wait here until the folders are gone
        if reason:
            raise OSError(f"the damaged checkpoints in {self.directory} cannot be moved ({reason}): move them yourself")
        self._manager().reload()

    def _move(self, steps: list[int]) -> None:
        folder = self.workdir / "damaged"
        for step in steps:
            place = next(p for i in itertools.count() if not (p := folder / f"{step}-{i}").exists())
            move_folder(self.directory / str(step), place)
            logging.warning("Moved the damaged checkpoint of step %d to %s.", step, place)


# --------------------------------------------------------------------------- helpers


def _together(item: str, action: Callable[[], Any]) -> Any:
    """The result of `action`. Raises DamageError, on every process, when it fails on any of them."""
    result, reason = None, ""
    try:
        result = action()
    except Exception as error:
        reason = str(error) if isinstance(error, DamageError) else brief(error)
    if reason := agree(reason):
        raise DamageError(f"{item}: {reason}")
    return result


def _leaves(flat: Mapping[str, Array]) -> dict[str, dict[str, Any]]:
    prints = fingerprints(flat)
    return {k: {"print": prints[k], "dtype": str(x.dtype), "shape": list(x.shape)} for k, x in flat.items()}


def _arrays(state: Any) -> dict[str, Array]:
    flat = {path: jnp.asarray(leaf) for path, leaf in tree.flatten(state).items()}
    keys = [path for path, leaf in flat.items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]
    if keys:
        raise TypeError(
            f"the state holds random keys ({tree.listed(keys)}): derive them from the seed and step instead"
        )
    return flat


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    # Without a sharding Orbax would ask for the devices that saved, which may not exist here.
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=sharding)


def _read_item(folder: epath.Path) -> Any:
    """A JSON item, bounded; `finite=False` because a config may hold infinity."""
    return read_json(folder / "metadata", finite=False)


def _check_seal(meta: Any) -> dict[str, Any]:
    if not isinstance(meta, dict) or meta.get("seal") != _crc({k: v for k, v in meta.items() if k != "seal"}):
        raise DamageError("not what was saved")
    # A seal is a checksum and no signature: a stranger's may be right around anything.
    kinds = META if meta.get("format") == FORMAT else {"format": int}
    wrong = [name for name, kind in kinds.items() if not isinstance(meta.get(name), kind)]
    wrong += [path for path, leaf in ({} if wrong else meta.get("leaves", {})).items() if not _is_leaf(leaf)]
    if wrong:
        raise DamageError(f"{tree.listed(list(map(shown, wrong)))} is not what this version writes")
    return meta


def _is_leaf(leaf: Any) -> bool:
    return isinstance(leaf, dict) and {"print", "dtype", "shape"} <= leaf.keys()


def _check_data(data: Any, meta: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(data, dict) or "value" not in data or meta["data"] != _crc(data):
        raise DamageError("not what was saved")
    return data


def _check_leaves(saved: Mapping[str, Any], wanted: Mapping[str, jax.ShapeDtypeStruct], where: str) -> None:
    rows = []
    for path in sorted(saved.keys() | wanted.keys()):
        was = f"{saved[path]['dtype']}{saved[path]['shape']}" if path in saved else "absent"
        now = f"{wanted[path].dtype}{list(wanted[path].shape)}" if path in wanted else "absent"
        if was != now:
            rows.append(f"{path}: {was} -> {now}")
    if rows:
        raise ValueError(
            f"{where} holds another architecture or optimizer, {len(rows)} leaves differ (checkpoint -> this run):"
            f" {tree.listed(rows)}; use the config that made it, or another --workdir"
        )


def _crc(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
