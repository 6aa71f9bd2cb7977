"""What the host does about skipped steps: it counts them, and after too many in a row stops, or goes back."""

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
from src.train.nonfinite.locate import Finder
from src.train.state import TrainState, with_extras
from src.train.step import StepMetrics
from src.train.trainer import Trainer

BEHIND = 1  # steps that the device may work on while the host looks at the one before


class Watch:
    """Looks at every step a step late, so that the device need not wait; all processes see the same at the same step.

    `config.guard`: after `patience` skipped steps in a row the run stops, or with `restore` goes back to the newest
    checkpoint, `restores` times in all.
    """

    def __init__(self, trainer: Trainer, checkpoints: Checkpointer):
        self.trainer, self.checkpoints, self.config = trainer, checkpoints, trainer.system.config.guard
        self.finder = Finder(trainer)
        self.seen: deque[tuple[int, Mapping[str, Batch], StepMetrics]] = deque()

    def add(self, step: int, batch: Mapping[str, Batch], measured: StepMetrics) -> None:
        """Step number `step`, from 1, has been started."""
        self.seen.append((step, batch, measured))

    def look(self, state: TrainState, behind: int = 0) -> TrainState | None:
        """None, or the state to go on with instead of `state`, which is used up.

        All steps are looked at but the last `behind`. Raises FloatingPointError when it is time to stop.
        """
        while len(self.seen) > behind:
            step, batch, measured = self.seen.popleft()
            if int(measured.guard["streak"]) < self.config.patience:
                continue
            with watchdog.during(watchdog.START):  # the search is compiled
                story = self._story(state, step, batch, measured)
            if not self.config.restore or int(measured.guard["restored"]) >= self.config.restores:
                raise FloatingPointError(story)
            logging.error("%s", story)
            now = self.seen[-1][0] if self.seen else step
            self.seen.clear()
            with watchdog.during(watchdog.START):
                return self._back(
                    state, now, step - int(measured.guard["skipped"]), int(measured.guard["restored"]), story
                )
        return None

    def _story(self, state: TrainState, step: int, batch: Mapping[str, Batch], measured: StepMetrics) -> str:
        """One sentence: which steps, what was not finite, where it began, what is left, and what to do."""
        streak, wrong = int(measured.guard["streak"]), not_finite(measured)
        if wrong:
            what = f"{listed(wrong)} {'was' if len(wrong) == 1 else 'were'} NaN or infinite"
            try:
                place = self.finder.find(with_extras(state), batch, step - 1, measured.squares["grad"])
                what += (
                    f" (first seen in {place})" if place else " (but not when it was repeated: suspect the hardware)"
                )
            except Exception as error:  # what is known must be told, whatever the search for more met
                what += f" (where it began could not be found: {brief(error)})"
            advice = "look there, or lower optim.lr or optim.grad_clip"
        else:
            what = f"the gradient, of norm {float(measured.terms['grad_norm'].total):.4g}, was a spike"
            advice = "raise guard.spike or lower optim.lr"
        self.checkpoints.finish()
        newest = self.checkpoints.latest_step()
        saved = "no checkpoint was saved yet" if newest is None else (
            f"the last good checkpoint is that of step {newest} in {self.checkpoints.directory}"
        )  # fmt: skip
        return (
            f"step {step} is the last of {streak} in a row that were skipped: {what}; parameters were kept as they were"
            f" before and {saved}: {advice}, and run again"
        )

    def _back(self, state: TrainState, now: int, learned: int, restored: int, story: str) -> TrainState:
        """A checkpoint's parameters with the present step: all that was learned since counts as skipped.

        It is the newest whose parameters had fewer updates than the `learned` of those that failed: what was saved
        during the streak has these very ones.
        """
        for leaf in jax.tree.leaves(state):
            leaf.delete()  # there may be no room for two states
        for number in sorted(self.checkpoints.all_steps(), reverse=True):
            try:
                old = self.checkpoints.restore(self.trainer.abstract, step=number)[0]
            except RuntimeError:  # damaged, which was told
                continue
            if steps_taken(old) < learned:
                break
        else:
            raise FloatingPointError(f"{story} (guard.restore found no checkpoint from before these parameters)")
        undone, guard = now - int(old.step), old.extra["guard"]
        logging.warning(
            "went back to the checkpoint of step %d; the batches of steps %d to %d are left out, so this run is"
            " no longer what config, seed and data alone make of it (time %d of at most %d)",
            int(old.step), int(old.step) + 1, now, restored + 1, self.config.restores,
        )  # fmt: skip
        guard = guard | {
            "skipped": _like(guard["skipped"], int(guard["skipped"]) + undone),
            "streak": _like(guard["streak"], 0),
            "restored": _like(guard["restored"], restored + 1),
        }
        return old.replace(step=_like(old.step, now), extra=old.extra | {"guard": guard})


def steps_taken(state: TrainState) -> int:
    """How many updates the parameters have had."""
    return int(state.step) - int(state.extra["guard"]["skipped"])


def not_finite(measured: StepMetrics) -> list[str]:
    """What of a step's loss and gradient is NaN or infinite: the losses by name, or "the loss"; "the gradient"."""
    terms = {k: float(t.total) for k, t in jax.device_get(measured.terms).items() if t.trained}
    names = [k for k, v in terms.items() if not np.isfinite(v)]
    losses = [k for k in names if "/" in k] or ["the loss"] * ("total" in names)
    grads = jax.device_get(measured.squares["grad"])
    return losses + ["the gradient"] * (not np.isfinite(sum(np.sum(x, dtype=np.float32) for x in grads.values())))


def _like(leaf: jax.Array, value: Any) -> jax.Array:
    return jax.device_put(np.asarray(value, leaf.dtype), leaf.sharding)
