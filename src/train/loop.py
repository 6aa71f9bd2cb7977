"""The one loop: restore, step, log, save, evaluate. Nobody owns another."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging

from src.common.runtime import stopping, watchdog
from src.common.runtime.progress import Progress
from src.common.runtime.writers import History, MetricWriter
from src.common.tree import count_parameters
from src.data.pipeline.stream import Mixture
from src.interfaces import Batch
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import FREE, check_config
from src.train.checkpoints.replicas import check_replicas
from src.train.metrics import Metrics
from src.train.nonfinite.monitor import BEHIND, Watch
from src.train.state import TrainState, with_extras
from src.train.step import Step, StepMetrics
from src.train.system import System
from src.train.trainer import Trainer, open_data

# May change between two runs in one workdir: where and how it is computed, not what.
ELASTIC = (*FREE, "mesh", "sharding", "accumulate", "data", "model.trunk.attention", "model.trunk.remat",
           "fields.*.head.chunk")  # fmt: skip

HELD_OUT = ("heldout/", "forgetting")


@runtime_checkable
class Callback(Protocol):
    """Looks on while a run trains, and changes nothing (`src/doctor`)."""

    def on_start(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """Before the first step of a new run; the state may be used up, and an equal one is returned.

        `batch` is the first one, on the devices. Raises ValueError when it makes no sense to go on.
        """
        ...

    def on_log(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """At every log line, after `step` steps, the last of which saw `batch`: more scalars for that line."""
        ...

    def due(self, step: int) -> bool:
        """Whether there is something to show after `step` steps; a function of the step alone."""
        ...

    def on_eval(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """Writes what takes longer; the names of its scalars begin with one of `HELD_OUT`."""
        ...


class NoCallback:
    """The callback that sees nothing."""

    def on_start(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """The same state."""
        return state

    def on_log(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """Nothing."""
        return {}

    def due(self, step: int) -> bool:
        """Never."""
        return False

    def on_eval(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """Nothing."""


def train(
    trainer: Trainer,
    checkpoints: Checkpointer,
    writer: MetricWriter,
    started: float,
    callback: Callback | None = None,
) -> tuple[TrainState, dict]:
    """Runs from the newest checkpoint (or from nothing) to `config.steps`; evaluates on the way.

    started   `time.monotonic()` of the start of the program, for `seconds_to_first_step`
    Returns the last state and the facts of the run. Raises FloatingPointError when `guard.patience` steps in a row had
    to be skipped (`nonfinite/monitor.py`), and Stopped when the run was asked to stop, after everything was saved;
    nothing spoilt is ever saved.
    """
    config = trainer.system.config
    done = (checkpoints.latest_step() or 0) >= config.steps
    if not done:
        logging.info("compiling the train step, which may take a minute the first time")
    with ThreadPoolExecutor(1) as pool:  # the step compiles while the state is made or read
        compiling = None if done else pool.submit(trainer.compile)
        state, step, position = restore(trainer, checkpoints)
    facts = {"parameters": count_parameters(trainer.abstract.params)}
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(contextlib.closing(open_data(trainer, checkpoints.workdir)))
        progress = stack.enter_context(contextlib.closing(Progress(config.steps, step)))
        stack.callback(checkpoints.finish)  # whatever happens, what was saved gets written
        stack.enter_context(jax.set_mesh(trainer.mesh))
        run = Run(trainer, checkpoints, writer, callback or NoCallback(), data, progress, state, step)
        if step < config.steps:
            run.update = compiling.result() if compiling else trainer.compile()
        del state  # the first step uses it up
        leaving = not run.resume(position)
        stopping.busy()
        while run.step < config.steps and not leaving:
            run.advance()
            if "seconds_to_first_step" not in facts:
                jax.block_until_ready(run.measured)
                facts["seconds_to_first_step"] = time.monotonic() - started
            leaving = stopping.asked()
            due = checkpoints.due(run.step, run.evaluates()) or run.step == config.steps
            if run.step % config.log.every == 0 or run.step == 1 or due:
                run.tell()
            if due or leaving or run.went_back:  # a stop leaves no trace in the log
                run.save()
            leaving = leaving or not run.evaluated()
        with watchdog.during(watchdog.SAVE):
            checkpoints.complete(run.save)
    if leaving:
        raise stopping.Stopped(f"at step {run.step}")
    stopping.busy(False)
    return run.state, facts | {"steps": run.step}


@dataclasses.dataclass
class Run:
    """Where a run stands: after `step` steps, the last of which saw `batch` and gave `measured`."""

    trainer: Trainer
    checkpoints: Checkpointer
    writer: MetricWriter
    callback: Callback
    data: Mixture
    progress: Progress
    state: TrainState
    step: int
    update: Step | None = None
    batch: Mapping[str, Batch] | None = None
    measured: StepMetrics | None = None
    went_back: bool = False  # in this step, to a checkpoint

    def __post_init__(self):
        self.meter = Metrics(self.trainer.system, self.trainer.schedule)
        self.watch = Watch(self.trainer, self.checkpoints)

    def resume(self, position: Any) -> bool:
        """Goes on where `save` was called (`position`, or None: from the start) as if nothing had come after it.

        False when the run was asked to stop meanwhile. Raises RuntimeError when the copies of the state differ.
        """
        if position is not None:
            self.data.set_state(position["rows"])
            self.data.set_counts(position["counts"])
            self.meter.set_state(position["meter"])
        if isinstance(self.writer, History):
            self.writer.rewind(-1 if position is None else self.step, self.again())
        check_replicas(self.state, self.data.get_state(), self.step)
        return position is None or self.evaluated()  # this comes after the save, and may have been cut short

    def again(self) -> tuple[str, ...]:
        """What begins the names of everything that is told of a step after it was saved, and is due now."""
        last = self.step == self.trainer.system.config.steps
        return ("eval/",) * (last or self.evaluates()) + HELD_OUT * self.callback.due(self.step)

    def evaluates(self) -> bool:
        """Whether the evaluators run after this step; after the last one `src/run.py` does that."""
        config = self.trainer.system.config
        return config.eval.every > 0 and self.step % config.eval.every == 0 and 0 < self.step < config.steps

    def advance(self) -> None:
        """One step."""
        watchdog.at(watchdog.DATA)
        began = time.monotonic()
        rows = next(self.data)
        self.meter.waited(time.monotonic() - began)
        self.batch = self.trainer.place(rows, self.step)
        watchdog.at(watchdog.START if self.measured is None else watchdog.STEP)
        if self.step == 0:
            self.state = self.callback.on_start(self.trainer, self.update, self.state, self.batch)
        self.state, self.measured = self.update(self.state, self.batch)
        self.step += 1
        self.meter.add(self.measured)
        self.watch.add(self.step, self.batch, self.measured)
        last = self.step == self.trainer.system.config.steps
        if (instead := self.watch.look(self.state, behind=0 if last else BEHIND)) is not None:
            self.state = instead  # that of a checkpoint, from which the run goes on here
        self.went_back = instead is not None

    def tell(self) -> None:
        """One line of the log."""
        scalars = self.meter.flush(self.step) | self.data.settle()
        with watchdog.during(watchdog.START):  # it may compile
            scalars |= self.callback.on_log(self.step, self.state, self.batch, self.measured)
        self.writer.write_scalars(self.step, scalars)
        self.progress.update(self.step, scalars)

    def save(self) -> None:
        """Starts to write a checkpoint; the log reaches this step before it does.

        Raises RuntimeError when the copies of the state differ.
        """
        position = {"rows": self.data.get_state(), "counts": self.data.get_counts()}
        position["meter"] = self.meter.get_state(self.step)
        with watchdog.during(watchdog.SAVE):
            check_replicas(self.state, position["rows"], self.step)
            if isinstance(self.writer, History):
                self.writer.settle()
            self.checkpoints.save(self.step, self.state, position, self.trainer.system.identity())

    def evaluated(self) -> bool:
        """Shows and evaluates what is due. False when the run was asked to stop meanwhile; then this step is saved."""
        try:
            if self.callback.due(self.step):
                with watchdog.during(watchdog.EVALUATE):
                    self.callback.on_eval(self.step, self.state, self.writer)
            if self.evaluates():
                scalars = evaluate(self.trainer.system, self.state, self.writer, self.step)
                self.checkpoints.score(self.step, scalars)
        except stopping.Stopped:
            self.save()
            return False
        return True


def restore(trainer: Trainer, checkpoints: Checkpointer) -> tuple[TrainState, int, Any]:
    """State, step and position (see `Run.save`) of the newest sound checkpoint, or a fresh state at step 0 and None."""

    def accept(saved: Any) -> None:
        if trainer.system.start:
            trainer.system.start.recall(saved)
        for field, (old, new) in check_config(saved, trainer.system.identity(), ELASTIC).items():
            logging.info("the config changed since the checkpoint: %s %r -> %r", field, old, new)

    found = checkpoints.restore(trainer.abstract, accept)
    if found is None:
        return trainer.init(), 0, None
    state, position, _ = found
    step = int(state.step)
    logging.info("resuming from step %d in %s", step, checkpoints.directory)
    return state, step, position


def evaluate(system: System, state: TrainState, writer: MetricWriter, step: int) -> dict[str, float]:
    """Runs every evaluator on the averaged (or last) parameters and writes what they find.

    Raises Stopped when the run is asked to stop.
    """
    params = state.ema if system.config.eval.ema else state.params
    pipeline = system.pipeline.with_params(with_extras(state, params))
    scalars: dict[str, float] = {}
    for name, evaluator in system.evaluators.items():
        began = time.monotonic()
        stopping.check()
        with watchdog.during(watchdog.EVALUATE):
            result = evaluator(pipeline, system.config.seed)
        logging.info("evaluator %s took %.1f s", name, time.monotonic() - began)
        writer.write_scalars(step, {f"eval/{k}": v for k, v in result.scalars.items()})
        writer.write_images(step, {f"eval/{k}": v for k, v in result.images.items()})
        writer.write_texts(step, {f"eval/{k}": v for k, v in result.texts.items()})
        scalars |= result.scalars
    writer.flush()
    return scalars
