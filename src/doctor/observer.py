"""The doctor as the loop sees it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from src.common.writers import MetricWriter
from src.doctor.panels import Panels
from src.doctor.probe import Probe
from src.doctor.watch import Watch
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Measured, Step
from src.train.trainer import Trainer

Watcher = Callable[[int, TrainState, Mapping[str, Batch], Measured], Mapping[str, float]]


class Doctor:
    """Watchers at every log line, and panels."""

    def __init__(self, watchers: Sequence[Watcher], panels: Panels):
        self.watchers, self.panels = watchers, panels

    def begin(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """The same state."""
        return state

    def look(self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: Measured) -> Mapping[str, float]:
        """What all watchers say."""
        return {k: v for watcher in self.watchers for k, v in watcher(step, state, batch, measured).items()}

    def show(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """A panel, where one is due."""
        self.panels(step, state, writer)


def make_doctor(trainer: Trainer) -> Doctor:
    """The doctor of a run."""
    return Doctor([Watch(trainer), Probe(trainer)], Panels(trainer))
