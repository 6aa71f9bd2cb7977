"""The training loop of all systems: restore, step, log, save, evaluate."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol, runtime_checkable

import jax
from absl import logging

from src.common.mesh.distributed import is_first
from src.common.runtime import cpu_devices, stopping, watchdog
from src.common.runtime.progress import Progress
from src.common.runtime.tracing import Tracer
from src.common.runtime.writers import History, MetricWriter
from src.common.tree import count_parameters
from src.data.pipeline.stream import Mixture
from src.interfaces import Batch
from src.train.average import used_params
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import FREE, check_config
from src.train.checkpoints.replicas import check_replicas
from src.train.flops import seconds_at_peak
from src.train.goodput import Goodput
from src.train.metrics import Metrics
from src.train.nonfinite.monitor import BEHIND, NonfiniteMonitor
from src.train.optim import rate_change
from src.train.state import TrainState, with_extras
from src.train.step import Step, StepMetrics
from src.train.system import System
from src.train.trainer import Trainer, open_data

# Config groups that may differ between two runs in one workdir: how things are computed, not what.
ELASTIC = (*FREE, "mesh", "sharding", "accumulate", "data", "model.trunk.attention", "model.trunk.remat",
           "fields.*.head.chunk")  # fmt: skip

HELD_OUT = ("heldout/", "forgetting")


@runtime_checkable
class Callback(Protocol):
    """Observes training and has no effect on it (`src/doctor`)."""

    def on_start(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """Before the first step of a new run: may donate the state, and returns an equal one.

        `batch` is the first one, on the devices. Raises ValueError to stop the run.
        """
        ...

    def on_log(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """More scalars for the log line after `step` steps, the last of them on `batch`."""
        ...

    def due(self, step: int) -> bool:
        """Whether to call `on_eval` after `step` steps; depends on `step` alone."""
        ...

    def on_eval(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """Writes results that take longer; the names of its scalars begin with one of `HELD_OUT`."""
        ...


class NoCallback:
    """The callback that does nothing."""

    def on_start(self, trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]) -> TrainState:
        """The same state."""
        return state

    def on_log(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> Mapping[str, float]:
        """No scalars."""
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
    goodput: Goodput | None = None,
    tracer: Tracer | None = None,
) -> tuple[TrainState, dict]:
    """Trains from the newest checkpoint, or from step 0, to `config.steps`, with evaluations. Returns the last state
    and facts of the run (parameters, seconds to the first step, steps).

    started   `time.monotonic()` at the start of the program, for `seconds_to_first_step`
    goodput   the account of the time, and tracer, which makes the traces that were asked for

    Raises FloatingPointError when `guard.patience` steps in a row were skipped (`nonfinite/monitor.py`), and Stopped
    when the run was asked to stop, after saving.
    """
    config, goodput, tracer = trainer.system.config, goodput or Goodput(), tracer or Tracer()
    latest = checkpoints.latest_step() or 0
    done = latest >= config.steps
    if not done:
        goodput.begin(latest)
        logging.info("compiling the train step, which may take a minute the first time")
    with ThreadPoolExecutor(1) as pool:  # the step compiles while the state is initialized or restored
        compiling = None if done else pool.submit(trainer.compile)
        state, step, position = restore(trainer, checkpoints)
        cpu_devices.keep(checkpoints.workdir)  # a run that was refused leaves the number of the one before
        if step < config.steps and (done or step != latest):
            goodput.begin(step)
        goodput.at("compile")
    goodput.at("start")
    facts = {"parameters": count_parameters(trainer.abstract.params)}
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(contextlib.closing(open_data(trainer, checkpoints.workdir)))
        progress = stack.enter_context(contextlib.closing(Progress(config.steps, step)))
        stack.callback(checkpoints.finish)  # also after an error, the pending checkpoint is written
        stack.enter_context(jax.set_mesh(trainer.mesh))
        run = Run(trainer, checkpoints, writer, callback or NoCallback(), data, progress, state, step)
        run.goodput, run.tracer = goodput, tracer
        if step < config.steps:
            run.update = compiling.result() if compiling else trainer.compile()
            tracer.program = getattr(run.update, "as_text", None)
        stack.callback(run.close)
        del state  # the first step donates it
        leaving = not run.resume(position)
        stopping.busy()
        while run.step < config.steps and not leaving:
            run.trace()
            run.advance()
            if "seconds_to_first_step" not in facts:
                jax.block_until_ready(run.measured)
                facts["seconds_to_first_step"] = time.monotonic() - started
            leaving = run.follow_up(stopping.asked())
        with run.apart("save", watchdog.SAVE):
            checkpoints.complete(run.save)
    if leaving:
        raise stopping.Stopped(f"at step {run.step}")
    stopping.busy(False)
    return run.state, facts | {"steps": run.step}


@dataclasses.dataclass
class Run:
    """State of a run after `step` steps, the last of them on `batch` with metrics `measured`."""

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
    restored: bool = False  # a checkpoint was restored in this step (`guard.restore`)
    goodput: Goodput = dataclasses.field(default_factory=Goodput)
    tracer: Tracer = dataclasses.field(default_factory=Tracer)

    def __post_init__(self):
        self.metrics = Metrics(
            self.trainer.system,
            self.trainer.schedule,
            seconds_at_peak(self.trainer.system, self.trainer.mesh, self.trainer.placement.dtype),
        )
        self.monitor = NonfiniteMonitor(self.trainer, self.checkpoints)

    def resume(self, position: Any) -> bool:
        """Continues from `position` (see `save`; None: from step 0), and removes later entries of the log.

        False if the run was asked to stop meanwhile. Raises RuntimeError when the copies of the state differ.
        """
        if position is not None:
            self.data.set_state(position["rows"])
            self.data.set_counts(position["counts"])
            self.metrics.set_state(position["meter"])
        if isinstance(self.writer, History):
            self.writer.rewind(-1 if position is None else self.step, self.repeated_names())
        check_replicas(self.state, self.data.get_state(), self.step)
        return position is None or self.evaluate_due()  # evaluations follow the save, and may have been interrupted

    def repeated_names(self) -> tuple[str, ...]:
        """Name prefixes of the log entries of this step that are written after its checkpoint, and so again now."""
        last = self.step == self.trainer.system.config.steps
        return ("eval/",) * (last or self.evaluates()) + HELD_OUT * self.callback.due(self.step)

    def evaluates(self) -> bool:
        """Whether the evaluators run after this step; after the last one, `src/run.py` runs them."""
        config = self.trainer.system.config
        return config.eval.every > 0 and self.step % config.eval.every == 0 and 0 < self.step < config.steps

    def advance(self) -> None:
        """One step."""
        self.goodput.at("steps")
        with jax.profiler.StepTraceAnnotation("train", step_num=self.step + 1):
            watchdog.at(watchdog.DATA)
            began = time.monotonic()
            with self.goodput.during("data"), jax.profiler.TraceAnnotation("data_wait"):
                rows = next(self.data)
            self.metrics.waited(time.monotonic() - began)
            self.batch = self.trainer.place(rows, self.step)
            watchdog.at(watchdog.START if self.measured is None else watchdog.STEP)
            if self.step == 0:
                with self.apart("start", watchdog.START):
                    self.state = self.callback.on_start(self.trainer, self.update, self.state, self.batch)
            self.state, self.measured = self.update(self.state, self.batch)
            self.step += 1
            self.metrics.add(self.measured)
            self.monitor.add(self.step, self.batch, self.measured)
            last = self.step == self.trainer.system.config.steps
            if (instead := self.monitor.check(self.state, behind=0 if last else BEHIND)) is not None:
                self.state = instead  # of a checkpoint
            self.restored = instead is not None
        self.goodput.beat(self.step)

    def trace(self) -> None:
        """Begins or ends a trace between two steps, where one is due."""
        if self.tracer.due(self.step):
            jax.block_until_ready(self.measured)
            with self.apart("other", watchdog.TRACE):
                self.tracer.change(self.step)

    @contextlib.contextmanager
    def apart(self, part: str, place: str) -> Iterator[None]:
        """A block that is no step: its time is that of a part of the goodput, and does not count for the speed."""
        began = time.monotonic()
        with watchdog.during(place), self.goodput.during(part), jax.profiler.TraceAnnotation(part):
            yield
        self.metrics.paused(time.monotonic() - began)

    def close(self) -> None:
        """Ends the trace and the account of the steps."""
        with self.apart("other", watchdog.TRACE):
            self.tracer.close(self.step)
        self.goodput.record(self.step)
        self.goodput.at("other")

    def follow_up(self, leaving: bool) -> bool:
        """Logs, saves and evaluates after a step, where it is due. Whether the run was asked to stop."""
        config = self.trainer.system.config
        due = self.checkpoints.due(self.step, self.evaluates()) or self.step == config.steps
        if self.step % config.log.every == 0 or self.step == 1 or due:
            self.write_log()
        if due or leaving or self.restored:  # a stop writes no log line, so that a resumed run has the same log
            self.save()
        return leaving or not self.evaluate_due()

    def write_log(self) -> None:
        """One line of the log."""
        scalars = self.metrics.flush(self.step) | self.data.settle()
        with self.apart("evaluate", watchdog.START):  # the callback may compile
            scalars |= self.callback.on_log(self.step, self.state, self.batch, self.measured)
        scalars |= self.goodput.scalars()
        self.writer.write_scalars(self.step, scalars)
        self.progress.update(self.step, scalars)

    def save(self) -> None:
        """Writes the log up to this step, then starts to write a checkpoint.

        Raises RuntimeError when the copies of the state differ.
        """
        position = {"rows": self.data.get_state(), "counts": self.data.get_counts()}
        position["meter"] = self.metrics.get_state(self.step)
        jax.block_until_ready(self.state)  # what is left of the step is no part of the save
        self.goodput.record(self.step)
        with self.apart("save", watchdog.SAVE):
            check_replicas(self.state, position["rows"], self.step)
            if isinstance(self.writer, History):
                self.writer.settle()
            self.goodput.settle()
            self.checkpoints.save(self.step, self.state, position, self.trainer.system.identity())

    def evaluate_due(self) -> bool:
        """Runs the due evaluations. False if the run was asked to stop meanwhile; then this step is saved."""
        try:
            if self.callback.due(self.step):
                with self.apart("evaluate", watchdog.EVALUATE):
                    self.callback.on_eval(self.step, self.state, self.writer)
            if self.evaluates():
                with self.apart("evaluate", watchdog.EVALUATE):
                    scalars = evaluate(self.trainer.system, self.state, self.writer, self.step)
                self.checkpoints.score(self.step, scalars)
                self.goodput.record(self.step)
        except stopping.Stopped:
            self.save()
            return False
        return True


def restore(trainer: Trainer, checkpoints: Checkpointer) -> tuple[TrainState, int, Any]:
    """State, step and position (see `Run.save`) of the newest valid checkpoint, or a fresh state, 0 and None."""

    def accept(saved: Any) -> None:
        if trainer.system.init_from:
            trainer.system.init_from.restore_hash(saved)
        for field, (old, new) in check_config(saved, trainer.system.identity(), ELASTIC).items():
            logging.info("the config changed since the checkpoint: %s %r -> %r", field, old, new)

    found = checkpoints.restore(trainer.abstract, accept)
    if found is None:
        return trainer.init(), 0, None
    state, position, meta = found
    step = int(state.step)
    told = rate_change(meta["config"], trainer.system.config, step) if step < trainer.system.config.steps else ""
    if told and is_first():
        logging.warning("%s", told)
    logging.info("resuming from step %d in %s", step, checkpoints.directory)
    return state, step, position


def evaluate(
    system: System, state: TrainState, writer: MetricWriter, step: int, how: dict[str, Any] | None = None
) -> dict[str, float]:
    """Runs every evaluator on the averaged (or last) parameters, and writes and returns the results.

    how   gets, by number, what the evaluator says that it depends on

    Raises Stopped when the run is asked to stop.
    """
    params = used_params(state, system.config)
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
        if how is not None and result.how:
            how |= dict.fromkeys(result.scalars, result.how)
    writer.flush()
    return scalars
