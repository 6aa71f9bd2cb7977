"""Default methods of the step samplers (`interfaces.StepSampler`)."""

from __future__ import annotations

import dataclasses

from jaxtyping import Array, Float

from src.corruption.timesteps import shift_time
from src.interfaces import Process, PyTree


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBase:
    """Defaults: the process's times, and no state.

    shift   of the times towards noise, 1 = none
    """

    shift: float = 1.0

    def times(self, process: Process, steps: int) -> Float[Array, " T"]:
        """The process's times, shifted."""
        return shift_time(process.times(steps), self.shift)

    def init(self, process: Process, xt: PyTree) -> PyTree:
        """No state."""
        return ()
