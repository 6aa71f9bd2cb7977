"""Gradients of the objectives on the shared trunk, and the size of its activations, from one extra pass.

Two gradients conflict when their cosine is negative (Yu et al. 2020, Gradient Surgery, definition 1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from src.common.mesh.fsdp import Placement
from src.common.mesh.sharding import batch_sharding, replicated
from src.common.rng import step_key
from src.common.runtime import background
from src.common.tree import split_rows
from src.doctor.layer_stats import block, fast_compile, logged
from src.interfaces import Batch, PyTree
from src.models.model import STATES, TEACHER, bind
from src.train.state import TrainState, with_extras
from src.train.step import Add, StepMetrics
from src.train.system import Drawn, System, draw, prepare, terms_of, weighted_sum
from src.train.trainer import Trainer

PAIRED = 4  # up to so many objectives all pairs are logged; of more, each against the sum of the others


@struct.dataclass
class ConflictStats:
    """Measurements of K objectives, in the order of `labels`, and L blocks.

    products   inner products of the weighted objectives' gradients on the trunk
    rms        by task: root mean square of the residual stream of valid tokens after each block
    """

    products: Float[Array, "K K"]
    rms: dict[str, Float[Array, "L"]]


class GradientConflict:
    """Scalars of the log line at, or after, each `every`-th step (`config.doctor.every`).

    conflict/norm/<task>.<objective>   |gradient| of the weighted objective on the trunk
    conflict/cosine/<one>/<other>      cosine of two of these gradients; of more than 4 objectives `<one>/rest`
    activation/<task>/block_00 …       root mean square of the residual stream after the block

    Batch (with `accumulate` > 1 its first microbatch) and noise are those of the last step, the parameters those after
    it. The pass compiles during the first steps. Without memory for it, a single process warns and goes on.
    """

    def __init__(self, trainer: Trainer, every: int | None = None):
        self.trainer, self.every = trainer, trainer.system.config.doctor.every if every is None else every
        self._compiling: Future | None = None

    def due(self, step: int) -> bool:
        """Whether the log line of this step has these scalars; depends on `step` alone, so that a run can resume."""
        line = self.trainer.system.config.log.every
        return self.every > 0 and step % self.every < (line if step % line == 0 else 1)

    def __call__(
        self, step: int, state: TrainState, batch: Mapping[str, Batch], measured: StepMetrics
    ) -> dict[str, float]:
        """The scalars above, or none if not due."""
        config = self.trainer.system.config
        if not self.every or config.steps < self.every:
            return {}
        if self._compiling is None:
            self._compiling = background.begin(self.compile, "gradient conflict")
        if not self.due(step):
            return {}
        try:
            found = jax.device_get(self._compiling.result()(with_extras(state), state.extra["seed"], state.step, batch))
        except jax.errors.JaxRuntimeError as error:
            if jax.process_count() > 1:  # the other processes would wait for this one
                raise
            logging.warning("no gradient conflict from now on (%s): set doctor.every=0", str(error)[:200])
            self.every = 0
            return {}
        return scalars(self.trainer.system, found)

    def compile(self) -> Any:
        """The compiled pass: (parameters, seed, steps done, batch) -> ConflictStats."""
        trainer, state, rows = self.trainer, self.trainer.abstract, batch_sharding(self.trainer.mesh)
        spec = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=rows), trainer.system.spec())

        def measure(params: PyTree, seed: Array, done: Int[Array, ""], batch: Mapping[str, Batch]) -> ConflictStats:
            return conflict_stats(trainer.system, params, step_key(seed, done - 1), batch, trainer.placement)

        with jax.set_mesh(trainer.mesh):
            jitted = jax.jit(measure, out_shardings=replicated(trainer.mesh), compiler_options=fast_compile(trainer))
            return jitted.lower(with_extras(state), state.extra["seed"], state.step, spec).compile()


def labels(system: System) -> list[tuple[str, str]]:
    """(task, objective) of every objective with a weight."""
    return [(t, o) for t, plan in system.tasks.items() for o, (_, weight) in plan.objectives.items() if weight]


def conflict_stats(
    system: System, params: PyTree, key: Array, batch: Mapping[str, Batch], placement: Placement
) -> ConflictStats:
    """Gradients of all objectives on the trunk, with the noise of the step that has this key."""
    drawn = draw(system, batch, key)
    trunks, rms = [], {}
    for task, label in labels(system):
        grads, (_, rms[task]) = objective_gradient(system, params, drawn, task, label, placement)
        trunks.append([g.astype(jnp.float32) for g in jax.tree.leaves(grads["trunk"])])
    products = [[sum((a * b).sum() for a, b in zip(one, other, strict=True)) for other in trunks] for one in trunks]
    return ConflictStats(jnp.asarray(products), rms)


def objective_gradient(
    system: System, params: PyTree, drawn: Drawn, task: str, label: str, placement: Placement
) -> tuple[PyTree, tuple[Array, Float[Array, "L"]]]:
    """Gradient of weight · Σ (term / its count) of one objective, its value, and the rms of the blocks `[L]`.

    Runs only the rows of the task, so all objectives of different tasks together cost about one step. The gradients
    of all objectives add up to that of the step.
    """
    plan = system.tasks[task]
    alone = dataclasses.replace(plan, objectives={label: plan.objectives[label]})
    alone = dataclasses.replace(system, tasks={task: alone})
    views, draws = drawn
    rows = ({task: views[task]}, {task: {label: draws[task][label]}})
    parts = system.config.accumulate
    own = {name: part for name, part in params.items() if name not in (TEACHER, STATES)}
    fixed = {name: part for name, part in params.items() if name not in own}

    def local(own: PyTree, rows: Drawn, add: Add, fixed: PyTree) -> tuple[PyTree, PyTree]:
        rows = jax.tree.map(lambda a: a[0], split_rows(rows, parts)) if parts > 1 else rows
        view = rows[0][task]
        valid = view.layout.spec(view.batch).segment > 0

        def measure(h: Array) -> tuple[Array, Array]:
            return _squares(h[:, : valid.shape[1]], valid)  # context parallelism may pad the rows

        def loss(own: PyTree) -> tuple[Array, Any]:
            net = bind(alone.architecture, own | fixed, placement, measure)
            views, aux = prepare(alone, net, rows)
            hidden, (seen,) = net.run(views)
            terms = terms_of(alone, net, hidden, aux)
            return weighted_sum(alone, terms, {k: add(v.count) for k, v in terms.items()}), seen

        (total, seen), grads = jax.value_and_grad(loss, has_aux=True)(own)
        return grads, add((total, seen))

    grads, (total, (squares, count)) = placement.local(local, own, rows, fixed)
    return grads, (total, jnp.sqrt(squares / count))


def scalars(system: System, found: ConflictStats) -> dict[str, float]:
    """The scalars of `GradientConflict`; an objective whose gradient is zero has no cosine."""
    names, products = [".".join(pair) for pair in labels(system)], np.asarray(found.products, np.float64)
    norms = np.sqrt(np.diag(products))
    out = {f"conflict/norm/{name}": float(norm) for name, norm in zip(names, norms, strict=True)}
    for i, name in enumerate(names):
        if len(names) > PAIRED:
            rest = np.arange(len(names)) != i
            length = np.sqrt(max(products[np.ix_(rest, rest)].sum(), 0.0))
            others = {"rest": (products[i, rest].sum(), length)}
        else:
            others = {names[j]: (products[i, j], norms[j]) for j in range(i + 1, len(names))}
        for other, (product, length) in others.items():
            if norms[i] * length > 0:
                out[f"conflict/cosine/{name}/{other}"] = float(product / (norms[i] * length))
    for task, rms in found.rms.items():
        blocks = logged({block(i): float(value) for i, value in enumerate(np.asarray(rms))})
        out |= {f"activation/{task}/{name}": value for name, value in blocks.items()}
    return out


def _squares(h: Float[Array, "B S D"], valid: Bool[Array, "B S"]) -> tuple[Array, Array]:
    """Sum of squares of the valid tokens, and the count of numbers in it; padding may hold any values."""
    squares = jnp.where(valid[..., None], jnp.square(h.astype(jnp.float32)), 0)
    return squares.sum(), valid.sum(dtype=jnp.float32) * h.shape[-1]
