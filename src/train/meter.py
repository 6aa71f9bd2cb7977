"""What the steps measured since the last log line."""

from __future__ import annotations

import math
import time

import jax

from src.common.tree import listed
from src.train.optim import Schedule
from src.train.system import System


class Meter:
    """Measurements since the last log line, kept on the device until they are wanted, and the speed since then."""

    def __init__(self, system: System, schedule: Schedule):
        plans = system.tasks.values()
        self.tokens = sum(p.rows * p.layout.length for p in plans)
        self.images = sum(p.rows * len(p.layout.named("image")) for p in plans)
        self.schedule, self.pending, self.since = schedule, [], time.monotonic()

    def add(self, measured: Measured) -> None:
        """Remembers one step."""
        self.pending.append(measured.terms)

    def flush(self, step: int) -> dict[str, float]:
        """Means over the steps since the last call. Raises FloatingPointError when one is not finite."""
        sums = jax.tree.map(lambda *a: sum(map(float, a)), *jax.device_get(self.pending))
        steps, seconds = len(self.pending), max(time.monotonic() - self.since, 1e-9)
        means = {k: t.total / t.count for k, t in sums.items() if t.count}
        bad = [k for k, v in means.items() if not math.isfinite(v)]
        if bad:
            raise FloatingPointError(
                f"{listed(bad)} became NaN or infinite between steps {step - steps} and {step}; what was saved"
                " before is sound: lower optim.lr or optim.max_norm, or look at the data of these tasks, and run again"
            )
        self.pending, self.since = [], time.monotonic()
        norms = {k: means.pop(k) for k in ("grad_norm", "update_norm") if k in means}
        losses = {"loss": means.pop("total"), **{f"loss/{k}": v for k, v in means.items()}}
        rates = {"tokens_per_second": self.tokens * steps / seconds, "images_per_second": self.images * steps / seconds}
        return losses | norms | rates | {"learning_rate": float(self.schedule(step - 1))}
