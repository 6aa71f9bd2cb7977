"""The training doctor as the loop sees it: checks before the first step, measurements and panels while a run trains."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from src.common.runtime.writers import MetricWriter
from src.doctor.diagnostic import settle
from src.doctor.gradient_conflict import Probe
from src.doctor.held_out import Panels
from src.doctor.layer_stats import Vitals
from src.doctor.run_checks import examine
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainer import Trainer

Watcher = Callable[[int, TrainState, Mapping[str, Batch], StepMetrics], Mapping[str, float]]


class Doctor:
    """An `Observer` of `train.loop`. It changes nothing.

    checks     whether there are checks before the first step
    watchers   (step, state, batch, measured) -> scalars for the log line, in this order
    panels     what is shown from time to time, or None
    """

    def __init__(self, checks: bool = True, watchers: Sequence[Watcher] = (), panels: Panels | None = None):
        self.checks, self.watchers, self.panels = checks, tuple(watchers), panels

    def begin(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """Runs the checks. Raises ValueError with all that they found when one found an error."""
        if not self.checks:
            return state
        state, findings = examine(trainer, update, state, batch)
        settle(findings)
        return state

    def look(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """What the watchers see."""
        scalars: dict[str, float] = {}
        for watch in self.watchers:
            scalars |= watch(step, state, batch, measured)
        return scalars

    def due(self, step: int) -> bool:
        """Whether there is a panel after `step` steps."""
        return self.panels is not None and self.panels.due(step)

    def show(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """The panel of this step."""
        if self.panels is not None:
            self.panels(step, state, writer)


def make_doctor(trainer: Trainer, every: int | None = None) -> Doctor:
    """The doctor of a run; it probes `every` so many steps, by default those of the config."""
    checks = trainer.system.config.doctor.checks
    return Doctor(checks, [Vitals(trainer), Probe(trainer, every)], Panels(trainer))
