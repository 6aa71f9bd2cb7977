"""Default methods of the step samplers (`interfaces.StepSampler`), and the time grids of ids.

Source of the grids: Ma et al. 2025 "ReDDiT".
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
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


TIMELINES = ("linear", "cosine", "arccos", "power")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimelineBase(StepBase):
    """Defaults with a choice of the times; u falls from 1 to 0 in equal steps.

    timeline   linear: u; cosine: sin(pi u / 2), few tokens per step at first; arccos: 2/pi arccos(1 - u), few at the
               end; power: u^exponent
    exponent   of `power`
    shift      of the times towards noise, 1 = none

    Raises ValueError for an unknown timeline, and an exponent that is not positive.
    """

    timeline: str = "linear"
    exponent: float | int = 1.25

    def __post_init__(self):
        if self.timeline not in TIMELINES or not self.exponent > 0:
            raise ValueError(
                f"timeline={self.timeline!r} must be one of {TIMELINES}, and exponent={self.exponent} be above 0."
            )

    def times(self, process: Process, steps: int) -> Float[Array, " T"]:
        """The process's times on the timeline, shifted."""
        return shift_time(on_timeline(process.times(steps), self.timeline, self.exponent), self.shift)


def on_timeline(u: Float[Array, " T"], timeline: str, exponent: float = 1.25) -> Float[Array, " T"]:
    """Times of equal steps u, see `TimelineBase`; 1 and 0 stay."""
    if timeline == "cosine":
        return jnp.where(u < 1, jnp.sin(jnp.pi / 2 * u), 1.0)
    if timeline == "arccos":
        return jnp.where(u < 1, 2 / jnp.pi * jnp.arccos(1 - u), 1.0)
    return u**exponent if timeline == "power" else u
