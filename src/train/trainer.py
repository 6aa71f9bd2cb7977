"""A system on its devices: optimizer, shardings, compiled step and data."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging

from src.common.mesh.distributed import check_same, data_shard, put_batch
from src.common.mesh.fsdp import Placement
from src.common.mesh.sharding import ShardingRules, batch_sharding, make_mesh, replicated
from src.common.rng import step_key
from src.common.tree import flatten
from src.data.pipeline.bad_rows import Ledger
from src.data.pipeline.first_rows import check_rows
from src.data.pipeline.stream import Mixture
from src.interfaces import Batch, PyTree
from src.train.average import further
from src.train.optim import Schedule, build_optimizer
from src.train.state import TrainState, first_state, init_params, init_state, with_extras
from src.train.step import make_train_step
from src.train.system import System
from src.train.teacher import teacher_selector
from src.train.trainable import multiplier_rules


@dataclasses.dataclass
class Trainer:
    """A system on its devices, with optimizer and shardings.

    abstract    the train state as abstract arrays with shardings
    placement   shardings and dtype of the parameters for the network
    """

    system: System
    mesh: jax.sharding.Mesh
    optimizer: optax.GradientTransformation
    schedule: Schedule
    abstract: TrainState
    placement: Placement

    def init(self) -> TrainState:
        """A fresh state with its shardings; the same each time."""
        with jax.set_mesh(self.mesh):
            return self._first_state(self._init_params(self._seed), self._seed)

    def init_params(self) -> PyTree:
        """The parameters of a fresh state, with their shardings."""
        with jax.set_mesh(self.mesh):
            return self._init_params(self._seed)

    def place(self, rows: Mapping[str, Batch], step: int) -> dict[str, Batch]:
        """A host batch (this process's rows) on the devices and encoded, the input of the step after `step` steps.

        Random numbers of frozen encoders depend only on the run's seed and `step`.
        """
        batch = put_batch(rows, self.mesh)
        if not self.system.encoders.nets:
            return batch
        with jax.set_mesh(self.mesh):
            return self._encode(self._encoder_params, batch, self._seed, np.int32(step))

    def encoder_shapes(self) -> dict[str, PyTree]:
        """Parameters of the frozen encoders on each device, abstract."""
        encoders, whole = self.system.encoders, replicated(self.mesh)
        needed = encoders.needed(encoders.shapes(), self.system.raw_spec())
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole), needed)

    def raw_batch(self) -> dict[str, Batch]:
        """A batch of raw data on the devices, abstract."""
        return self._rows(self.system.raw_spec())

    def batch(self) -> dict[str, Batch]:
        """A batch for the train step on the devices, abstract."""
        return self._rows(self.system.spec())

    def _rows(self, batch: PyTree) -> PyTree:
        rows = batch_sharding(self.mesh)
        return jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), batch)

    def lower_encode(self) -> jax.stages.Lowered | None:
        """The program of the frozen encoders that `place` runs, traced with shapes only; None without encoders."""
        if not self.system.encoders.nets:
            return None
        numbers = (jax.ShapeDtypeStruct((), kind) for kind in (np.uint32, np.int32))
        with jax.set_mesh(self.mesh):
            return self._encode.lower(self.encoder_shapes(), self.raw_batch(), *numbers)

    @functools.cached_property
    def _encoder_params(self) -> dict[str, PyTree]:
        encoders = self.system.encoders
        needed = encoders.needed(encoders.read(), self.system.raw_spec())
        return jax.device_put(needed, replicated(self.mesh))

    @functools.cached_property
    def _encode(self) -> Callable[..., dict[str, Batch]]:
        def encode(params: PyTree, batch: Mapping[str, Batch], seed: Any, step: Any) -> dict[str, Batch]:
            row_shards = math.prod(self.mesh.shape.get(axis, 1) for axis in ("data", "fsdp"))
            with jax.named_scope("encoders"):
                return self.system.encoders.encode(params, batch, step_key(seed, step), row_shards)

        return jax.jit(encode, out_shardings=batch_sharding(self.mesh))

    @property
    def _seed(self) -> np.uint32:
        return np.uint32(self.system.config.seed)

    # Cached, since the doctor makes parameters and state a second time.

    @functools.cached_property
    def _init_params(self) -> Callable[[np.uint32], PyTree]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract.params)
        if self.system.init_from is None:
            make_all = lambda seed: init_params(self.system.init, seed)
            return jax.jit(make_all, out_shardings=shardings, compiler_options=self._once)
        places, start = flatten(shardings), self.system.init_from

        @functools.cache
        def some(paths: tuple[str, ...]) -> Callable[[np.uint32], dict[str, jax.Array]]:
            def make(seed: jax.Array) -> dict[str, jax.Array]:
                leaves = flatten(init_params(self.system.init, seed))
                return {path: leaves[path] for path in paths}

            return jax.jit(make, out_shardings={path: places[path] for path in paths}, compiler_options=self._once)

        return lambda seed: start.read(self.abstract.params, lambda paths: some(tuple(paths))(seed))

    @functools.cached_property
    def _first_state(self) -> Callable[[PyTree, np.uint32], TrainState]:
        shardings = jax.tree.map(lambda leaf: leaf.sharding, self.abstract)
        make = lambda params, seed: first_state(
            params, self.optimizer, seed, teacher_selector(self.system), process_states(self.system),
            tuple(further(self.system.config.ema)),
        )  # fmt: skip
        return jax.jit(make, donate_argnums=0, out_shardings=shardings, compiler_options=self._once)

    @property
    def _once(self) -> dict[str, Any]:
        """Compiler options of programs that run once: on a CPU, compiling them takes half the time at this level."""
        fast = jax.config.read("jax_disable_most_optimizations")  # level 0 already
        cpu = self.mesh.devices.flat[0].platform == "cpu"
        return {"xla_backend_optimization_level": 1} if cpu and not fast else {}

    def lower(self) -> jax.stages.Lowered:
        """The train step, traced with shapes only: (state, batch) -> (state, metrics)."""
        step = make_train_step(self.system, self.optimizer, self.system.config, self.placement)
        out = (jax.tree.map(lambda leaf: leaf.sharding, self.abstract), replicated(self.mesh))
        step = jax.jit(step, donate_argnums=0, out_shardings=out)
        with jax.set_mesh(self.mesh):
            return step.lower(self.abstract, self.batch())

    def compile(self) -> Any:
        """The compiled train step."""
        return self.lower().compile()


def make_trainer(system: System, devices: Sequence[Any] | None = None) -> Trainer:
    """Places a system on the mesh of its config.

    Raises ValueError when the mesh does not match the devices, or a task's rows do not divide over them.
    """
    config = system.config
    mesh = make_mesh(config.mesh, devices)
    row_shards = math.prod(mesh.shape.get(axis, 1) for axis in ("data", "fsdp")) * config.accumulate
    uneven = {n: p.rows for n, p in system.tasks.items() if p.rows % row_shards}
    if uneven:
        raise ValueError(
            f"tasks {uneven} (rows of a batch) do not divide over {row_shards} = devices x accumulate: change batch, or"
            " tasks.<task>.weight"
        )
    shapes = jax.eval_shape(system.init, jax.random.key(0))
    optimizer, schedule = make_optimizer(config, shapes)
    keep, names = teacher_selector(system), tuple(further(config.ema))
    state = jax.eval_shape(lambda: init_state(system.init, optimizer, config.seed, keep, process_states(system), names))
    rules = ShardingRules(**config.sharding)
    rules.check(shapes, mesh)
    trunk, tensor = config.model.trunk, mesh.shape.get("tensor", 1)
    if trunk.heads % tensor or trunk.kv_heads % tensor:
        logging.warning(
            "mesh.tensor=%d does not divide heads=%d and kv_heads=%d: some devices of that axis hold more heads",
            tensor, trunk.heads, trunk.kv_heads,
        )  # fmt: skip
    shardings = rules.shardings(state, mesh)
    abstract = jax.tree.map(lambda s, h: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=h), state, shardings)
    specs = {path: leaf.sharding.spec for path, leaf in flatten(with_extras(abstract)).items()}
    return Trainer(system, mesh, optimizer, schedule, abstract, Placement(specs, jnp.dtype(config.model.dtype)))


def make_optimizer(config: Any, shapes: PyTree) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a run for parameters of these shapes, and its schedule. Raises as `build_optimizer`."""
    settings = config.optim.to_dict()
    settings["steps"] = settings["steps"] or config.steps
    settings["lr_multipliers"] = multiplier_rules(config)
    return build_optimizer(settings, shapes)


def process_states(system: System) -> PyTree:
    """The states of adaptive processes before the first step, by field."""
    states = {name: field.process.state() for name, field in system.fields.items() if field.process is not None}
    return {name: state for name, state in states.items() if state is not None}


def check_data(system: System) -> None:
    """Opens the data of every task and reads a few rows, to find missing, unsuitable or unreadable data early.

    Raises FileNotFoundError or ValueError.
    """
    tasks = {name: plan.task for name, plan in system.tasks.items()}
    rows = {f"the number of rows of {name}": task.rows("train") for name, task in tasks.items()}
    for name, task in tasks.items():
        system.encoders.check(name, getattr(task, "latents_of", None))
    check_same(rows)
    for name, task in tasks.items():
        check_rows(name, task, share=system.config.data.max_bad.share)


def check_evaluators(system: System) -> None:
    """Lets every evaluator look at the files that it will read (`check`).

    Raises FileNotFoundError or ValueError, naming `eval.evaluators.<name>`.
    """
    for name, evaluator in system.evaluators.items():
        if check := getattr(evaluator, "check", None):
            try:
                check(system.fields)
            except (ValueError, FileNotFoundError) as error:
                raise type(error)(f"eval.evaluators.{name}: {error}") from error


def open_data(trainer: Trainer, workdir: Any = None) -> Mixture:
    """This process's rows of the batches of all tasks; bad rows are listed in `workdir`. Raises as `check_data`."""
    check_data(trainer.system)
    plans = trainer.system.tasks
    tasks = {name: plan.task for name, plan in plans.items()}
    shard, order = data_shard(trainer.mesh)
    config, rows = trainer.system.config, {name: plan.rows for name, plan in plans.items()}
    if len(rows) > 1:
        total = sum(rows.values())
        shares = ", ".join(f"{name} {count} ({count / total:.3f})" for name, count in rows.items())
        logging.info("a batch of %d rows: %s", total, shares)
    ledger = Ledger(workdir, **config.data.max_bad)
    return Mixture(tasks, rows, config.seed, shard, order=order, workers=config.data.workers, ledger=ledger)
