"""Checkpoints, written by Orbax (a lazy import) and verified when read.

A checkpoint is `<workdir>/checkpoints/<step>/` with three items: `state` (arrays as nested dicts), `data` (JSON, the
position in the data) and `meta` (JSON), see `metadata.py`. Orbax detects truncated files, but not flipped bits, hence
the fingerprints.

Several processes write one checkpoint together, each its own shards, and decide together: a checkpoint that one of them
cannot read is damaged for all.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from absl import logging
from etils import epath
from ml_collections import ConfigDict

from src.common import tree
from src.common.files.store import is_remote
from src.common.mesh.distributed import agree, gather_texts
from src.common.runtime import errors
from src.common.runtime.errors import brief, explain
from src.train.checkpoints import integrity, metadata
from src.train.checkpoints import retention as keeping
from src.train.checkpoints.integrity import DamageError
from src.train.checkpoints.manager import open_manager
from src.train.checkpoints.workdir import Held, check_writable, unwritable


class Checkpointer:
    """Saves and restores the train state of one run.

    keep        number of newest checkpoints to keep
    every       steps between checkpoints (used by `due` only)
    keep_every  also keep checkpoints at multiples of it; 0: none
    best        `{"metric", "mode", "keep"}`: also keep the `keep` best by a score (see `score`); no metric: none
    readonly    change nothing on disk, to read a run that may still be training

    Raises ValueError for invalid settings, and OSError when `workdir` cannot be written.
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str],
        keep: int = 3,
        every: int = 1000,
        keep_every: int = 0,
        best: Mapping[str, Any] | ConfigDict | None = None,
        readonly: bool = False,
    ):
        best = {"metric": "", "mode": "max", "keep": 1} | dict(best or {})
        self.retention = keeping.Retention(keep, keep_every, best["metric"], best["mode"], best["keep"])
        if readonly:
            self.workdir = epath.Path(workdir if is_remote(str(workdir)) else os.path.abspath(workdir))
        else:
            self.workdir = check_writable(workdir)
        self.directory = self.workdir / "checkpoints"
        self.every, self.readonly = every, readonly
        self._held = None if readonly else Held(self.workdir)
        self._scores = keeping.ScoreFile(self.workdir)
        self._opened: Any = None
        self._pending: int | None = None
        self._failure: str | None = None
        self._error = ""
        self._sound: set[int] = set()  # written whole or read back by this process
        self._scored = False
        if not readonly and (reason := agree(unwritable(self.directory))):
            raise OSError(f"{self.directory} cannot be written ({reason}): correct it, or choose another --workdir")

    def due(self, step: int, evaluated: bool = False) -> bool:
        """Whether to save at `step`: at multiples of `every` and `keep_every`, and if `evaluated` to find the best."""
        regular = any(n > 0 and step % n == 0 for n in (self.every, self.retention.every))
        return step > 0 and (regular or (evaluated and bool(self.retention.metric)))

    def all_steps(self) -> list[int]:
        """The steps of all checkpoints."""
        return self._steps()

    def latest_step(self) -> int | None:
        """The newest checkpoint, not yet verified and perhaps still being written, or None."""
        return max(self._steps(), default=None)

    def choose(self, which: str) -> int | None:
        """The step for a number, for `best` (by score), or None for `latest`.

        Raises ValueError for other words, and when no checkpoint has a score.
        """
        if which == "latest":
            return None
        if which.isdigit():
            return int(which)
        if which != "best":
            raise ValueError(f"--step={which} is not a checkpoint; give a number, latest or best")
        ranked = self.retention.ranked(self._steps(), self._known_scores())
        if not ranked:
            metric = self.retention.metric
            why = f"no checkpoint has a score {metric!r}" if metric else "checkpoint.best.metric is not set"
            raise ValueError(f"--step=best is not known in {self.workdir}: {why}; give a number or latest instead")
        return ranked[0]

    def score(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Stores the evaluators' scalars of a step, to rank checkpoints. A score that is missing, NaN or infinite does
        not count."""
        steps = self._steps()
        if jax.process_index() == 0:
            self._scores.write(step, scalars, steps)
        self._scored = True
        metric = self.retention.metric
        if metric and step not in self.retention.ranked([step], {step: scalars}):
            value = f"is {scalars[metric]}" if metric in scalars else f"is none of {keeping.names(scalars)}"
            logging.warning("checkpoint.best.metric=%s %s: step %d does not count.", metric, value, step)

    def save(self, step: int, state: Any, data_state: Any, config: Any) -> bool:
        """Starts to write a checkpoint and returns; afterwards `state` may be donated.

        `data_state` and `config` are JSON values or a ConfigDict. Returns False if the step exists already or the write
        could not start. A failed write (disk full) is logged at the next call; `wait` raises if the last one failed.
        Raises RuntimeError as `check_there` does.
        """
        import orbax.checkpoint as ocp

        self.check_there()
        jax.block_until_ready(state)
        self._settle()
        if self._failure:
            self._sweep()
        if step in self._steps():
            return False
        if jax.process_index() == 0:
            self._scores.forget(step)
        flat = metadata.arrays(state)
        meta, data = metadata.describe(step, flat, data_state, config)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(tree.unflatten(flat)), data=ocp.args.JsonSave(data), meta=ocp.args.JsonSave(meta)
        )
        self._pending, reason = step, ""
        try:
            if not self._manager().save(step, args=items, force=True):
                reason = "Orbax declined to save"
        except Exception as error:
            reason = explain(error)
        return self._succeeded(reason)

    def complete(self, again: Callable[[], Any]) -> None:
        """Waits for the last write, and calls `again` to retry it if it failed. Raises OSError as `wait` does, and as
        `check_there`."""
        self.check_there()
        self._settle()
        if self._failure:
            again()
        self.wait()

    def check_there(self) -> None:
        """Raises RuntimeError, on every process, where the workdir was removed or replaced since this was made."""
        if self._held and (reason := agree(self._held.lost())):
            raise RuntimeError(reason)

    def restore(
        self, abstract_state: Any, accept: Callable[[Any], Any] | None = None, step: int | None = None
    ) -> metadata.Found | None:
        """The newest valid checkpoint as (state, data_state, meta), or None if there are no checkpoints.

        abstract_state   the state's tree of arrays or `ShapeDtypeStruct`s; the result has their shardings (without one,
                         the first local device), so the mesh may differ from the one that saved
        accept           called with the saved config; raises to refuse it (see `check_config`)
        step             read this checkpoint only

        A damaged checkpoint causes a warning and the next older one is read; if that succeeds, damaged ones are moved
        to `<workdir>/damaged`, with older ones whose marker or items are damaged. Raises ValueError for other leaves
        than those of `abstract_state` or an unknown format, RuntimeError when all checkpoints are damaged, and
        FileNotFoundError for a missing `step`, and then changes nothing on disk.
        """
        self._settle()
        steps = sorted(self._steps(), reverse=True)
        if step is not None and step not in steps:
            there = tree.listed(steps) or "none"
            raise FileNotFoundError(f"there is no checkpoint of step {step} in {self.directory}; there are {there}")
        damaged: dict[int, str] = {}
        for each in steps if step is None else [step]:
            folder = self.directory / str(each)
            try:
                found = metadata.read(folder, abstract_state, accept)
            except DamageError as error:
                damaged[each] = integrity.describe_damage(folder, error)
                last = each == steps[-1] or step is not None
                logging.warning(
                    "Checkpoint %s is damaged (%s)%s.", folder, damaged[each], "" if last else "; trying the one before"
                )
                continue
            if jax.process_index() == 0 and (files := integrity.changed_files(folder)):
                logging.warning("Checkpoint %s is valid, but %s.", folder, tree.listed(files))
            self._sound.add(each)
            if step is None:
                damaged |= integrity.unmarked(
                    self.directory, [older for older in steps if older < each], metadata.ITEMS
                )
            if not self.readonly:
                self._set_aside(list(damaged))
            return found
        if damaged:
            listed = "; ".join(f"{self.directory / str(step)}: {why}" for step, why in damaged.items())
            if step is not None:
                others = tree.listed([each for each in steps if each != step]) or "none"
                raise RuntimeError(f"the checkpoint is damaged ({listed}): choose another --step; there are {others}")
            raise RuntimeError(
                f"all {len(damaged)} checkpoints are damaged, and the run does not silently start again from step 0"
                f" ({listed}): restore a copy, or choose another --workdir to start again"
            )
        return None

    def finish(self) -> None:
        """Waits until this process has written its shards; `wait` raises if that failed."""
        if self._opened is None or self._pending is None:
            return
        try:
            self._opened.wait_until_finished()
        except Exception as error:
            self._error = explain(error)

    def wait(self) -> None:
        """Waits for the last write of all processes. Raises OSError if it failed."""
        self._settle()
        if self._failure:
            advice = errors.way_out(self._failure, self.directory)
            raise OSError(f"the last checkpoint was not written: {self._failure}; {advice}")

    def close(self) -> None:
        """Waits as `wait` does (and raises as it does), then releases Orbax's threads."""
        try:
            self.wait()
        finally:
            manager, self._opened = self._opened, None
            for each in filter(None, (self._held, manager)):
                each.close()

    # ----------------------------------------------------------------------- within

    def _manager(self) -> Any:
        if self._opened is None:
            integrity.shorten_orbax_errors()
            if not self.readonly:
                self._sweep()
            self._opened = open_manager(self.directory, self.readonly)
        return self._opened

    def _steps(self) -> list[int]:
        # No Orbax (a slow import) for a folder that does not exist yet; all processes must call it together.
        asked = self._opened or jax.process_count() > 1 or is_remote(self.directory)
        if not (asked or self.directory.exists()):  # `exists` is False for a store that does not answer
            return []
        return json.loads(gather_texts(json.dumps(list(self._manager().all_steps())))[0])

    def _known_scores(self) -> dict[int, dict[str, float]]:
        """The scores that process 0 reads."""
        book = self._scores.read() if jax.process_index() == 0 else {}
        return {int(step): each for step, each in json.loads(gather_texts(json.dumps(book))[0]).items()}

    def _settle(self) -> None:
        """Waits for the pending write, keeps its error for `wait`, and removes old checkpoints."""
        self.finish()
        reason, self._error = self._error, ""
        if self._pending is not None and self._succeeded(reason):
            step, self._pending, self._failure = self._pending, None, None
            self._sound.add(step)
            if jax.process_index() == 0:
                integrity.write_file_list(self.directory / str(step))
            self._prune()
        elif self._scored:
            self._prune()

    def _succeeded(self, reason: str) -> bool:
        """Whether the pending step was written, with no `reason` against it on any process."""
        reason = agree(reason)
        if not reason:
            return True
        step, self._pending = self._pending, None
        self._failure = f"step {step}: {reason}"
        logging.error("Checkpoint %s; training goes on and the next save is tried.", self._failure)
        if self._opened is not None:
            self._sweep()
            self._opened.reload()  # Orbax counts the step as saved
            if errors.FULL.called in reason:
                self._make_room()
        return False

    def _sweep(self) -> None:
        if jax.process_index() == 0:
            keeping.sweep(self.directory)

    def _prune(self) -> None:
        """Removes the checkpoints that retention does not keep, unless no kept one is verified."""
        self._scored = False
        steps, scores = self._steps(), self._known_scores()
        kept = self.retention.kept(steps, scores)
        gone = sorted(set(steps) - kept)
        if self.readonly or not gone or not kept & self._sound:
            return
        if jax.process_index() == 0:
            for step in gone:
                try:
                    keeping.remove(self.directory / str(step))
                except Exception as error:  # clients of stores raise errors of their own classes
                    logging.warning("Could not remove checkpoint %s: %s", self.directory / str(step), brief(error))
        agree("")  # the others wait here until the folders are gone
        self._manager().reload()

    def _make_room(self) -> None:
        """After a full disk: removes the oldest checkpoint, and keeps fewer from now on, if a newer one is verified."""
        steps = sorted(self._steps())
        free = [s for s in steps if s not in self.retention.chosen(steps, self._known_scores())]
        if not free or not any(step > free[0] for step in self._sound & set(steps)):
            logging.warning("No checkpoint in %s can be spared to make room: free space there.", self.directory)
            return
        left = sum(step > free[0] for step in steps)
        self.retention = dataclasses.replace(self.retention, last=left)
        logging.warning(
            "Removing checkpoint %s to make room; only the newest %d stay from now on.",
            self.directory / str(free[0]), left,
        )  # fmt: skip
        self._prune()

    def _set_aside(self, steps: Sequence[int]) -> None:
        """Moves damaged checkpoints away, so that the run can save those steps again."""
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

    def _move(self, steps: Sequence[int]) -> None:
        integrity.move_damaged(self.workdir, steps)
