"""The one loop: restore, step, log, save, evaluate. Nobody owns another."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import optax
from absl import logging

from src.common.distributed import check_same, data_shard, put_batch
from src.common.placement import Placement
from src.common.progress import Progress
from src.common.sharding import ShardingRules, batch_sharding, make_mesh, replicated
from src.common.tree import count_parameters, flatten, listed
from src.common.writers import MetricWriter
from src.data.pipeline import Mixture
from src.interfaces import LossTerm
from src.train.checkpoint import Checkpointer
from src.train.compatible import FREE, check_config
from src.train.optim import Schedule, build_optimizer
from src.train.state import TrainState, init_state
from src.train.step import make_train_step
from src.train.system import System

ELASTIC = (*FREE, "mesh", "sharding", "accumulate", "data")  # may change between two runs in one workdir


@dataclasses.dataclass
class Trainer:
    """A system on its devices: optimizer, shardings and the compiled step."""

    system: System
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    schedule: Schedule
    abstract: TrainState
    placement: Placement

    def init(self) -> TrainState:
        """A fresh state, made where it will live."""
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        make = jax.jit(
            lambda: init_state(self.system.init, self.optimizer, self.system.config.seed), out_shardings=shardings
        )
        with jax.set_mesh(self.mesh):
            return make()

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced on shapes alone: (state, batch) -> (state, measurements)."""
        rows = batch_sharding(self.mesh)
        batch = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), self.system.spec())
        step = make_train_step(self.system, self.optimizer, self.system.config, self.placement)
        out = (jax.tree.map(lambda leaf: leaf.sharding, self.abstract), replicated(self.mesh))
        step = jax.jit(step, donate_argnums=0, out_shardings=out)
        with jax.set_mesh(self.mesh):
            return step.lower(self.abstract, batch)

    def compile(self) -> Any:
        """The train step, ahead of its first batch."""
        return self.lower().compile()


def make_trainer(system: System, devices: Sequence[Any] | None = None) -> Trainer:
    """Places a system on the mesh of its config.

    Raises ValueError when the mesh does not match the devices, or a task's rows do not divide over them.
    """
    config = system.config
    mesh = make_mesh(config.mesh, devices)
    ways = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp")) * config.accumulate
    uneven = {n: p.rows for n, p in system.tasks.items() if p.rows % ways}
    if uneven:
        raise ValueError(
            f"tasks {uneven} (rows of a batch) do not divide over {ways} = devices x accumulate; change batch or shares"
        )
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    settings = config.optim.to_dict()
    settings["steps"] = settings["steps"] or config.steps
    optimizer, schedule = build_optimizer(settings, shapes)
    state = jax.eval_shape(lambda: init_state(system.init, optimizer, config.seed))
    rules = ShardingRules(**config.sharding)
    rules.check(shapes, mesh)
    trunk, tensor = config.model.trunk, mesh.shape.get("tensor", 1)
    if trunk.heads % tensor or trunk.kv_heads % tensor:
        logging.warning(
            "mesh.tensor=%d does not divide heads=%d and kv_heads=%d: a device of that axis holds more heads than its"
            " share", tensor, trunk.heads, trunk.kv_heads,
        )  # fmt: skip
    shardings = rules.shardings(state, mesh)
    abstract = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), state, shardings)
    specs = {path: leaf.sharding.spec for path, leaf in flatten(abstract.params).items()}
    return Trainer(system, mesh, optimizer, schedule, abstract, Placement(specs, jnp.dtype(config.model.dtype)))


def train(trainer: Trainer, checkpoints: Checkpointer, writer: MetricWriter, started: float) -> tuple[TrainState, dict]:
    """Runs from the newest checkpoint (or from nothing) to `config.steps`; evaluates on the way.

    started   `time.monotonic()` of the start of the program, for `seconds_to_first_step`
    Returns the last state and the facts of the run. Raises FloatingPointError when a loss is not finite, before
    anything spoilt is saved.
    """
    system, config = trainer.system, trainer.system.config
    done = (checkpoints.latest_step() or 0) >= config.steps
    with ThreadPoolExecutor(1) as pool:  # the step compiles while the state is made or read
        compiling = None if done else pool.submit(trainer.compile)
        state, step, data_state = restore(trainer, checkpoints)
    data = open_data(trainer)
    if data_state is not None:
        data.set_state(data_state)
    facts = {"parameters": count_parameters(trainer.abstract.params), "steps": config.steps}
    meter = Meter(system, trainer.schedule)
    progress = Progress(config.steps, step)
    if step < config.steps:
        update = compiling.result() if compiling else trainer.compile()
    with contextlib.ExitStack() as stack:
        stack.callback(data.close)
        stack.callback(progress.close)
        stack.callback(checkpoints.finish)  # whatever happens, what was saved gets written
        stack.enter_context(jax.set_mesh(trainer.mesh))
        while step < config.steps:
            state, measured = update(state, put_batch(next(data), trainer.mesh))
            step += 1
            meter.add(measured)
            first = "seconds_to_first_step" not in facts
            if first:
                jax.block_until_ready(measured)
                facts["seconds_to_first_step"] = time.monotonic() - started
            due = checkpoints.due(step) or step == config.steps
            if step % config.log.every == 0 or first or due:  # never save what was not looked at
                scalars = meter.flush(step)
                writer.write_scalars(step, scalars)
                progress.update(step, scalars)
            if due:
                checkpoints.save(step, state, data.get_state(), system.identity())
            if config.eval.every and step % config.eval.every == 0 and step < config.steps:
                evaluate(system, state, writer, step)
    checkpoints.wait()
    return state, facts


def open_data(trainer: Trainer) -> Mixture:
    """This process's share of the batches of every task."""
    plans = trainer.system.tasks
    tasks = {name: plan.task for name, plan in plans.items()}
    check_same({f"the number of rows of {name}": task.rows("train") for name, task in tasks.items()})
    shard, order = data_shard(trainer.mesh)
    config, rows = trainer.system.config, {name: plan.rows for name, plan in plans.items()}
    return Mixture(tasks, rows, config.seed, shard, order=order, workers=config.data.workers)


def restore(trainer: Trainer, checkpoints: Checkpointer) -> tuple[TrainState, int, Any]:
    """State, step and data state of the newest sound checkpoint, or a fresh state at step 0."""

    def accept(saved: Any) -> None:
        for field, (old, new) in check_config(saved, trainer.system.identity(), ELASTIC).items():
            logging.info("the config changed since the checkpoint: %s %r -> %r", field, old, new)

    found = checkpoints.restore(trainer.abstract, accept)
    if found is None:
        return trainer.init(), 0, None
    state, data_state, _ = found
    step = int(state.step)
    logging.info("resuming from step %d in %s", step, checkpoints.directory)
    return state, step, data_state


def evaluate(system: System, state: TrainState, writer: MetricWriter, step: int) -> dict[str, float]:
    """Runs every evaluator on the averaged (or last) parameters and writes what they find."""
    params = state.ema if system.config.eval.ema else state.params
    predict = system.predictor.with_params(params)
    scalars: dict[str, float] = {}
    for name, evaluator in system.evaluators.items():
        began = time.monotonic()
        result = evaluator(predict, system.config.seed)
        logging.info("evaluator %s took %.1f s", name, time.monotonic() - began)
        writer.write_scalars(step, {f"eval/{k}": v for k, v in result.scalars.items()})
        writer.write_images(step, {f"eval/{k}": v for k, v in result.images.items()})
        writer.write_texts(step, {f"eval/{k}": v for k, v in result.texts.items()})
        scalars |= result.scalars
    writer.flush()
    return scalars


class Meter:
    """Measurements since the last log line, kept on the device until they are wanted, and the speed since then."""

    def __init__(self, system: System, schedule: Schedule):
        plans = system.tasks.values()
        self.tokens = sum(p.rows * p.layout.length for p in plans)
        self.images = sum(p.rows * len(p.layout.named("image")) for p in plans)
        self.schedule, self.pending, self.since = schedule, [], time.monotonic()

    def add(self, measured: Mapping[str, LossTerm]) -> None:
        """Remembers one step."""
        self.pending.append(measured)

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
