"""Means of the step metrics for log lines, and speed."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from src.common.runtime.memory import MEMORY, memory_in_use
from src.common.tree import listed
from src.interfaces import row_of
from src.train import goodput
from src.train.optim import Schedule
from src.train.step import StepMetrics
from src.train.system import System, TaskPlan

SPEED = ("tokens_per_second", "images_per_second", "data_wait", "step_seconds", "mfu")
CLOCK = (*SPEED, *MEMORY, *goodput.NAMES)  # scalars that differ in a resumed run


class Metrics:
    """Metrics and speed since the last log line; metrics stay on the device until then.

    Sums are added step by step in float64, so that a run restored between two log lines logs the same numbers.
    """

    def __init__(self, system: System, schedule: Schedule, at_peak: float | None = None):
        """`at_peak`: seconds of a step at the devices' peak, where that is known."""
        plans = system.tasks.values()
        self.tokens = sum(p.rows * p.layout.length for p in plans)
        self.images = sum(p.rows * noised_parts(system, p) for p in plans)
        self.schedule, self.at_peak, self.pending = jax.jit(schedule), at_peak, []
        self._clear()

    def add(self, measured: StepMetrics) -> None:
        """Adds one step."""
        self.pending.append((measured.terms, measured.guard))

    def get_state(self, step: int) -> dict[str, Any]:
        """Sums since the last log line, as JSON values. Raises FloatingPointError as `flush` does."""
        self._settle(step)
        return {"steps": self.steps, "taken": self.taken, "sums": self.sums}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Restores the result of `get_state`."""
        self._clear()
        self.steps, self.taken = state["steps"], state["taken"]
        self.sums = {name: list(pair) for name, pair in state["sums"].items()}

    def waited(self, seconds: float) -> None:
        """Adds the time spent waiting for one batch."""
        self.waiting += seconds

    def paused(self, seconds: float) -> None:
        """Adds time up to now that was none of the steps': it does not count for their speed."""
        self.pauses = min(self.pauses + seconds, time.monotonic() - self.since)

    def flush(self, step: int) -> dict[str, float]:
        """Means over the steps taken since the last call (none if all were skipped), speed without pauses, share of the
        time spent waiting for data, and memory.

        A term "task/objective/name@part" becomes `buckets/task/objective/part`, every other one `loss/…`. Raises
        FloatingPointError when an update was infinite, as with finite gradients and a huge learning rate.
        """
        timed, means = len(self.pending), self._settle(step)
        seconds = max(time.monotonic() - self.since - self.pauses, 1e-9)
        if bad := [k for k in means if not math.isfinite(means[k])]:
            logging.warning(
                "%s became NaN or infinite by step %d; not logged, since it is not trained on", listed(bad), step
            )
        if skipped := self.steps - self.taken:
            logging.warning("skipped %d of the last %d steps, %d in all", skipped, self.steps, self.guard["skipped"])
        means = {k: v for k, v in means.items() if k not in bad}
        rates = {"tokens_per_second": self.tokens * timed / seconds, "images_per_second": self.images * timed / seconds}
        rates["data_wait"] = self.waiting / seconds
        if timed:
            rates["step_seconds"] = seconds / timed
            rates |= {"mfu": self.at_peak * timed / seconds} if self.at_peak else {}
        rates |= memory_in_use()
        skips = {f"guard/{k}": float(self.guard[k]) for k in ("skipped", "restored")}
        rate = float(self.schedule(step - 1 - int(self.guard["skipped"])))  # the schedule does not count skipped steps
        self._clear()
        norms = {k: means.pop(k) for k in ("grad_norm", "update_norm") if k in means}
        losses = {"loss": means.pop("total")} if "total" in means else {}
        return losses | {_public(k): v for k, v in means.items()} | norms | rates | skips | {"learning_rate": rate}

    def _clear(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.steps, self.taken, self.pending = 0, 0, []
        self.since, self.waiting, self.pauses = time.monotonic(), 0.0, 0.0

    def _settle(self, step: int) -> dict[str, float]:
        """Adds the pending steps to the sums. Returns the means so far."""
        for terms, guard in jax.device_get(self.pending):
            self.steps, self.guard = self.steps + 1, guard
            if guard["streak"]:
                continue
            self.taken += 1
            for name, term in terms.items():
                total, count = self.sums.get(name, (0.0, 0.0))
                self.sums[name] = [total + float(term.total), count + float(term.count)]
        self.pending = []
        means = {name: total / count for name, (total, count) in self.sums.items() if count}
        if not math.isfinite(means.get("update_norm", 0.0)):
            raise FloatingPointError(
                f"an update became infinite between steps {step - self.steps} and {step} though the gradients were"
                " finite; earlier checkpoints are not affected: lower optim.lr, and run again"
            )
        return means


def noised_parts(system: System, plan: TaskPlan) -> int:
    """Number of parts of a row whose fields have a process, such as images."""
    segments = [s for s in plan.layout.segments if system.fields[row_of(s.name)].process is not None]
    return sum(plan.layout.parts_of(s.name) for s in segments)


def _public(term: str) -> str:
    """Name of a term's mean in the log; parts of a loss are under `buckets/`, which the progress line leaves out."""
    path, _, part = term.partition("@")
    return f"buckets/{path.rsplit('/', 1)[0]}/{part}" if part else f"loss/{path}"
