"""The host's reaction to skipped steps: after too many in a row, stop or restore a checkpoint."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from absl import logging

from src.common.runtime import watchdog
from src.common.runtime.errors import brief
from src.common.tree import listed
from src.interfaces import Batch
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.nonfinite.locate import NonfiniteLocator
from src.train.state import TrainState, with_extras
from src.train.step import StepMetrics
from src.train.trainer import Trainer

BEHIND = 1  # steps in flight on the device while the host checks the one before


class NonfiniteMonitor:
    """Checks every step one step later, so that the device does not wait; all processes decide the same.

    `config.guard`: after `patience` skipped steps in a row the run stops, or with `restore` continues from an earlier
    checkpoint, at most `restores` times.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpointer):
        self.trainer, self.checkpoints, self.config = trainer, checkpoints, trainer.system.config.guard
        self.locator = NonfiniteLocator(trainer)
        self.seen: deque[tuple[int, Mapping[str, Batch], StepMetrics]] = deque()

    def add(self, step: int, batch: Mapping[str, Batch], measured: StepMetrics) -> None:
        """Adds step number `step`, from 1, after its start."""
        self.seen.append((step, batch, measured))

    def check(self, state: TrainState, behind: int = 0) -> TrainState | None:
        """None, or a restored state in place of `state`, which is then deleted.

        Checks all steps but the last `behind`. Raises FloatingPointError to stop the run.
        """
        while len(self.seen) > behind:
            step, batch, measured = self.seen.popleft()
            if int(measured.guard["streak"]) < self.config.patience:
                continue
            with watchdog.during(watchdog.START):  # the search is compiled
                message = self._message(state, step, batch, measured)
            if not self.config.restore or int(measured.guard["restored"]) >= self.config.restores:
                raise FloatingPointError(message)
            logging.error("%s", message)
            now = self.seen[-1][0] if self.seen else step
            self.seen.clear()
            with watchdog.during(watchdog.START):
                return self._restore(
                    state, now, step - int(measured.guard["skipped"]), int(measured.guard["restored"]), message
                )
        return None

    def _message(self, state: TrainState, step: int, batch: Mapping[str, Batch], measured: StepMetrics) -> str:
        """The error message: steps, what was not finite and where first, last checkpoint, advice."""
        streak, wrong = int(measured.guard["streak"]), not_finite(measured)
        if wrong:
            what = f"{listed(wrong)} {'was' if len(wrong) == 1 else 'were'} NaN or infinite"
            try:
                place = self.locator.locate(with_extras(state), batch, step - 1, measured.squares["grad"])
                what += f" (first in {place})" if place else " (but not when repeated: suspect the hardware)"
            except Exception as error:  # the rest of the message matters more
                what += f" (the place could not be found: {brief(error)})"
            advice = "correct that, or lower optim.lr or optim.grad_clip"
        else:
            what = f"the gradient, of norm {float(measured.terms['grad_norm'].total):.4g}, was a spike"
            advice = "raise guard.spike or lower optim.lr"
        self.checkpoints.finish()
        newest = self.checkpoints.latest_step()
        saved = "no checkpoint was saved yet" if newest is None else (
            f"the last good checkpoint is that of step {newest} in {self.checkpoints.directory}"
        )  # fmt: skip
        return (
            f"step {step} is the last of {streak} skipped steps in a row: {what}; parameters are those before them, and"
            f" {saved}: {advice}, and run again"
        )

    def _restore(self, state: TrainState, now: int, learned: int, restored: int, message: str) -> TrainState:
        """The state of a checkpoint with the present step; the steps between count as skipped.

        The newest checkpoint with fewer than `learned` updates, those of the failing parameters: a checkpoint written
        during the streak has the same parameters.
        """
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # two states may not fit into memory
        for number in sorted(self.checkpoints.all_steps(), reverse=True):
            try:
                old = self.checkpoints.restore(self.trainer.abstract, step=number)[0]
            except RuntimeError:  # damaged, which was logged
                continue
            if steps_taken(old) < learned:
                break
        else:
            raise FloatingPointError(f"{message} (guard.restore found no checkpoint from before these parameters)")
        undone, guard = now - int(old.step), old.extra["guard"]
        logging.warning(
            "restored the checkpoint of step %d and left out the batches of steps %d to %d, so config, seed and data"
            " no longer determine this run (restore %d of at most %d)",
            int(old.step), int(old.step) + 1, now, restored + 1, self.config.restores,
        )  # fmt: skip
        guard = guard | {
            "skipped": _like(guard["skipped"], int(guard["skipped"]) + undone),
            "streak": _like(guard["streak"], 0),
            "restored": _like(guard["restored"], restored + 1),
        }
        return old.replace(step=_like(old.step, now), extra=old.extra | {"guard": guard})


def steps_taken(state: TrainState) -> int:
    """Number of updates of the parameters."""
    return int(state.step) - int(state.extra["guard"]["skipped"])


def not_finite(measured: StepMetrics) -> list[str]:
    """What is NaN or infinite: names of losses, or else "the loss"; "the gradient"."""
    terms = {k: float(t.total) for k, t in jax.device_get(measured.terms).items() if t.trained}
    names = [k for k, v in terms.items() if not np.isfinite(v)]
    losses = [k for k in names if "/" in k] or ["the loss"] * ("total" in names)
    grads = jax.device_get(measured.squares["grad"])
    return losses + ["the gradient"] * (not np.isfinite(sum(np.sum(x, dtype=np.float32) for x in grads.values())))


def _like(leaf: jax.Array, value: Any) -> jax.Array:
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
