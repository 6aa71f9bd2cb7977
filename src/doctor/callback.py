"""The loop's callback: checks before the first step, measurements and held-out evaluations during training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from src.common.runtime.writers import MetricWriter
from src.doctor.diagnostic import log_or_raise
from src.doctor.gradient_conflict import GradientConflict
from src.doctor.held_out import HeldOut
from src.doctor.layer_stats import LayerStats
from src.doctor.run_checks import check_run
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainer import Trainer

Measurement = Callable[[int, TrainState, Mapping[str, Batch], StepMetrics], Mapping[str, float]]


class Doctor:
    """A `Callback` of `train.loop` with no effect on training.

    checks         whether to run the checks before the first step
    measurements   (step, state, batch, metrics) -> scalars of a log line
    held_out       the held-out evaluation, or None
    """

    def __init__(self, checks: bool = True, measurements: Sequence[Measurement] = (), held_out: HeldOut | None = None):
        self.checks, self.measurements, self.held_out = checks, tuple(measurements), held_out

    def on_start(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """Runs the checks. Raises ValueError with all findings when one is an error."""
        if not self.checks:
            return state
        state, findings = check_run(trainer, update, state, batch)
        log_or_raise(findings)
        return state

    def on_log(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """Scalars of all measurements."""
        scalars: dict[str, float] = {}
        for watch in self.measurements:
            scalars |= watch(step, state, batch, measured)
        return scalars

    def due(self, step: int) -> bool:
        """Whether a held-out evaluation is due after `step` steps."""
        return self.held_out is not None and self.held_out.due(step)

    def on_eval(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """Runs the held-out evaluation."""
        if self.held_out is not None:
            self.held_out(step, state, writer)


def make_doctor(trainer: Trainer, every: int | None = None) -> Doctor:
    """The doctor of a run; it measures the gradient conflict every `every` steps, by default `config.doctor.every`."""
    checks = trainer.system.config.doctor.get("checks", True)
    return Doctor(checks, [LayerStats(trainer), GradientConflict(trainer, every)], HeldOut(trainer))
