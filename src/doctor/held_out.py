"""Held-out evaluations during training: losses, their change since the initial parameters, and generated images."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from src.common.mesh.distributed import data_shard
from src.common.mesh.sharding import replicated
from src.common.rng import stream
from src.common.runtime.writers import MetricWriter
from src.data.pipeline.reader import read_batch
from src.doctor.layer_stats import fast_compile
from src.interfaces import Batch, LossTerm, PyTree, row_of
from src.train.average import used_params
from src.train.state import TrainState, with_extras
from src.train.step import Add
from src.train.system import Drawn, System, TaskPlan, draw, losses
from src.train.trainer import Trainer

COLUMNS = 10


class HeldOut:
    """Evaluates every `config.doctor.panels` steps (0: every `config.eval.every`), and after the last step.

    heldout/<task>/<objective>/<term>   mean over the same held-out rows with the same noise each time
    forgetting/<task>/<objective>/…     the same minus its value for the initial parameters; positive is worse
    drawings/<task>                     images generated from the same prompts and noise each time

    Uses the averaged parameters if `config.eval.ema`. The initial parameters are made again and measured at the first
    evaluation of a process, so that checkpoints need not store their losses.
    """

    def __init__(self, trainer: Trainer):
        config = trainer.system.config
        self.trainer, self.every = trainer, config.doctor.panels or config.eval.every
        self.batches, self.drawings = config.doctor.batches, config.doctor.drawings
        self.plans = {name: plan for name, plan in trainer.system.tasks.items() if _held_out(name, plan)}
        self.system = dataclasses.replace(trainer.system, tasks=self.plans)
        self._initial: dict[str, float] | None = None

    def due(self, step: int) -> bool:
        """Whether an evaluation is due after `step` steps."""
        last = step == self.trainer.system.config.steps
        return (bool(self.every) and step % self.every == 0) or last

    def __call__(self, step: int, state: TrainState, writer: MetricWriter) -> None:
        """Evaluates and writes the results, if due."""
        if not self.due(step):
            return
        began = time.monotonic()
        params = used_params(state, self.trainer.system.config)
        if self.batches and self.plans:
            now = self.heldout(with_extras(state, params))
            if self._initial is None:
                self._initial = self._at_the_start(state)
            change = {name: value - self._initial[name] for name, value in now.items() if self._initial}
            found = {f"heldout/{k}": v for k, v in now.items()} | {f"forgetting/{k}": v for k, v in change.items()}
            writer.write_scalars(step, found)
            if self._initial:
                writer.write_texts(step, {"forgetting": table(self._initial, now)})
        if self.drawings:
            pipeline = self.trainer.system.pipeline.with_params(with_extras(state, params))
            system = dataclasses.replace(self.trainer.system, pipeline=pipeline)
            writer.write_images(step, drawings(system, self.plans, self.drawings))
        logging.info("the held-out evaluation of step %d took %.1f s", step, time.monotonic() - began)

    def _at_the_start(self, state: TrainState) -> dict[str, float]:
        """Held-out losses of the initial parameters; empty if the weights of `init_from` can no longer be read."""
        try:
            params = self.trainer.init_params()
        except OSError as error:
            logging.warning("no scalars forgetting/…: the initial parameters cannot be made again (%s)", error)
            return {}
        return self.heldout(with_extras(state, params))

    def heldout(self, params: PyTree) -> dict[str, float]:
        """Mean of every term over the held-out rows, by "task/objective/term".

        The sums of a batch are added in float32 (docs/architecture/training.md says what that costs).
        """
        from clu.metrics import Average  # when it is needed: imports are most of the time of a start

        means: dict[str, Average] = {}
        seed = np.uint32(self.system.config.seed)
        for number, batch in enumerate(self._rows()):
            terms = jax.device_get(self._measure(params, seed, np.int32(number), self.trainer.place(batch, number)))
            for name, term in terms.items():
                mean = Average(total=term.total, count=term.count)
                means[name] = means[name].merge(mean) if name in means else mean
        return {name: float(mean.compute()) for name, mean in means.items() if mean.count}

    @functools.cached_property
    def _measure(self) -> Any:
        """Jitted: (parameters, seed, number of the batch, batch) -> terms."""
        system, placement = self.system, self.trainer.placement

        def measure(params: PyTree, seed: Any, number: Any, batch: Mapping[str, Batch]) -> dict[str, LossTerm]:
            key = stream(jax.random.key(seed), "heldout", number)

            def local(params: PyTree, rows: Drawn, add: Add) -> tuple[PyTree, PyTree]:
                terms = losses(system, params, rows, placement)
                trained = {name: term for name, term in terms.items() if term.trained}
                return jax.tree.map(jnp.zeros_like, params), add(trained)  # gradients are not needed

            return placement.local(local, params, draw(system, batch, key))[1]

        options = fast_compile(self.trainer)
        return jax.jit(measure, out_shardings=replicated(self.trainer.mesh), compiler_options=options)

    def _rows(self) -> Iterator[dict[str, Batch]]:
        """This process's rows of the held-out batches: evenly spaced in the split, the same at every evaluation. A bad
        row keeps its place and has count 0."""
        (mine, count), order = data_shard(self.trainer.mesh)
        for number in range(self.batches):
            batch = {}
            for name, plan in self.plans.items():
                have, wanted = plan.task.rows("test"), plan.rows * self.batches
                index = (np.arange(plan.rows) * self.batches + number) * have // wanted
                blocks = np.split(index, len(order))
                index = np.concatenate([blocks[b] for b in np.split(np.asarray(order), count)[mine]])
                batch[name], _ = read_batch(plan.task, "test", index)
            yield batch


def table(initial: Mapping[str, float], now: Mapping[str, float]) -> str:
    """Held-out losses of the initial and the current parameters, and their change, as a Markdown table."""
    lines = ["| held-out loss | initial | now | change |", "|---|---|---|---|"]
    return "\n".join(lines + [f"| {k} | {initial[k]:.4g} | {v:.4g} | {v - initial[k]:+.4g} |" for k, v in now.items()])


def drawings(system: System, held_out: Mapping[str, Any], count: int) -> dict[str, np.ndarray]:
    """`drawings/<task>`: images of each task that generates images, from `count` prompts: held-out ones if there are
    any, else training ones."""
    from src.evals.given import title
    from src.evals.grid import caption_grid

    pictures = {}
    for name, plan in system.tasks.items():
        made = plan.task.fill[0]
        shape = system.fields[row_of(made)].codec.delivered
        if len(shape) == 3 and shape[2] in (1, 3):
            given = plan.task.questions(count, "test" if name in held_out else "train")
            titles = [title(example, number) for number, example in enumerate(given)]
            images = system.pipeline.values(name, given, system.config.seed)[made]
            pictures[f"drawings/{name}"] = caption_grid(images, titles, COLUMNS)
    return pictures


def _held_out(name: str, plan: TaskPlan) -> bool:
    """Whether a task has held-out rows; one without is left out of the evaluation."""
    try:
        return plan.task.rows("test") > 0
    except ValueError as error:
        logging.info("task %s has no held-out losses: %s", name, error)
        return False
