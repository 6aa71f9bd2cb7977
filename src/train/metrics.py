"""What the steps measured since the last log line."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging

from src.common.tree import listed
from src.interfaces import row_of
from src.train.optim import Schedule
from src.train.step import StepMetrics
from src.train.system import System, TaskPlan

CLOCK = ("tokens_per_second", "images_per_second", "data_wait")  # all else of a line is the same in a resumed run


class Metrics:
    """Measurements since the last log line, kept on the device until they are wanted, and the speed since then.

    Sums are added one step after the other in 64 bits, so that a run that is saved and restored between two log lines
    tells the same numbers as one that is not.
    """

    def __init__(self, system: System, schedule: Schedule):
        plans = system.tasks.values()
        self.tokens = sum(p.rows * p.layout.length for p in plans)
        self.images = sum(p.rows * noised_parts(system, p) for p in plans)
        self.schedule, self.pending = schedule, []
        self._clear()

    def add(self, measured: StepMetrics) -> None:
        """Remembers one step."""
        self.pending.append((measured.terms, measured.guard))

    def get_state(self, step: int) -> dict[str, Any]:
        """What was measured since the last log line, as JSON. Raises FloatingPointError as `flush` does."""
        self._settle(step)
        return {"steps": self.steps, "taken": self.taken, "sums": self.sums}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes on where `get_state` was called."""
        self._clear()
        self.steps, self.taken = state["steps"], state["taken"]
        self.sums = {name: list(pair) for name, pair in state["sums"].items()}

    def waited(self, seconds: float) -> None:
        """Remembers the time that one batch was waited for."""
        self.waiting += seconds

    def flush(self, step: int) -> dict[str, float]:
        """Means over the steps that were taken since the last call (of none, there are none), speed, and the share of
        the time that was spent waiting for data.

        A term "task/objective/name@part" becomes `buckets/task/objective/part`, every other one `loss/…`. Raises
        FloatingPointError when the parameters are spoilt, which finite gradients can do at huge learning rates.
        """
        timed, means = len(self.pending), self._settle(step)
        seconds = max(time.monotonic() - self.since, 1e-9)
        if bad := [k for k in means if not math.isfinite(means[k])]:
            logging.warning(
                "%s became NaN or infinite by step %d; as it trains nothing it is left out", listed(bad), step
            )
        if skipped := self.steps - self.taken:
            logging.warning("skipped %d of the last %d steps, %d in all", skipped, self.steps, self.guard["skipped"])
        means = {k: v for k, v in means.items() if k not in bad}
        rates = {"tokens_per_second": self.tokens * timed / seconds, "images_per_second": self.images * timed / seconds}
        rates["data_wait"] = self.waiting / seconds
        skips = {f"guard/{k}": float(self.guard[k]) for k in ("skipped", "restored")}
        rate = float(self.schedule(step - 1 - int(self.guard["skipped"])))  # a skipped step is none to the schedule
        self._clear()
        norms = {k: means.pop(k) for k in ("grad_norm", "update_norm") if k in means}
        losses = {"loss": means.pop("total")} if "total" in means else {}
        return losses | {_public(k): v for k, v in means.items()} | norms | rates | skips | {"learning_rate": rate}

    def _clear(self) -> None:
        self.sums: dict[str, list[float]] = {}
        self.steps, self.taken, self.pending, self.since, self.waiting = 0, 0, [], time.monotonic(), 0.0

    def _settle(self, step: int) -> dict[str, float]:
        """Adds the pending steps to the sums; the means so far."""
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
                " finite; what was saved before is sound: lower optim.lr, and run again"
            )
        return means


def noised_parts(system: System, plan: TaskPlan) -> int:
    """Parts of a row whose fields have a process: images, mostly."""
    segments = [s for s in plan.layout.segments if system.fields[row_of(s.name)].process is not None]
    return sum(plan.layout.parts_of(s.name) for s in segments)


def _public(term: str) -> str:
    """The name of a term's mean: parts of a loss stand aside, so that a line of progress does not tell them."""
    path, _, part = term.partition("@")
    return f"buckets/{path.rsplit('/', 1)[0]}/{part}" if part else f"loss/{path}"
