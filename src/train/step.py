"""The train step of all systems."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jaxtyping import Array

from src.common import tree
from src.common.mesh.fsdp import Placement
from src.common.rng import step_key
from src.interfaces import Batch, LossTerm, PyTree
from src.models.model import STACKED, STATES
from src.objectives.diffusion import STATISTICS
from src.train import trainable
from src.train.average import AVERAGES, further, update_further
from src.train.optim import ema_update
from src.train.skip_nonfinite import COUNTS, accept_step, select
from src.train.state import TrainState, with_extras
from src.train.system import Drawn, System, draw, losses, weighted_sum

Add = Callable[[PyTree], PyTree]


@struct.dataclass
class StepMetrics:
    """Measurements of one step.

    terms    sums and counts by name: every loss term, the weighted `total`, and the norms of gradient and update
    squares  sums of squares of "grad" (before clipping), "update" and "param" (after the step) by the parameter's path;
             `[L]`, layer by layer, in the trunk's stack, else `[]`; frozen parameters have no gradient
    guard    number of `skipped` steps, `streak` of skipped steps that ends with this one (0: taken; else terms and
             "grad" are those of the skipped step), and number of returns to a checkpoint (`restored`)
    """

    terms: dict[str, LossTerm]
    squares: dict[str, dict[str, Array]]
    guard: dict[str, Array]


Step = Callable[[TrainState, Mapping[str, Batch]], tuple[TrainState, StepMetrics]]


def make_train_step(system: System, optimizer: optax.GradientTransformation, config: Any, placement: Placement) -> Step:
    """The function (state, batch) -> (state, metrics), to be jitted with the state donated.

    Random numbers are drawn for the whole batch before it is split, and counts are summed before dividing, so
    `accumulate` changes memory, not the result.
    """
    accumulate, ema, names = config.accumulate, config.ema, tuple(further(config.ema))

    def step(state: TrainState, batch: Mapping[str, Batch]) -> tuple[TrainState, StepMetrics]:
        with jax.named_scope("draw"):
            drawn = draw(system, batch, step_key(state.extra["seed"], state.step))
        trained, frozen = trainable.split(state.params, config)

        def local(trained: PyTree, rows: Drawn, add: Add, fixed: PyTree) -> tuple[PyTree, PyTree]:
            grads, terms, total = gradients(system, trained, rows, accumulate, placement, add, fixed)
            return grads, add((terms, total))

        grads, (terms, total) = placement.local(local, trained, drawn, with_extras(state, frozen))
        with jax.named_scope("guard"):
            seen = squared(grads)
            square = sum(values.sum() for values in seen.values())
            good, guard = accept_step(state.extra["guard"], state.step, total, square, config.guard.spike)
        still = jax.tree.map(jnp.zeros_like, frozen)
        with jax.named_scope("optimizer"):
            updates, opt_state = optimizer.update(tree.joined(grads, still), state.opt_state, state.params)
            params = select(good, optax.apply_updates(state.params, updates), state.params)
            averaged = ema_update(state.ema, params, ema.decay, state.step, warmup=ema.warmup)
            more = {AVERAGES: update_further(state.extra[AVERAGES], params, ema, state.step)} if names else {}
        terms, states = adapt(system, terms, state)
        states |= more
        with jax.named_scope("guard"):
            new = state.replace(
                step=state.step + 1,
                params=params,
                ema=select(good, averaged, state.ema),
                opt_state=select(good, opt_state, state.opt_state),
                extra=state.extra | {"guard": guard} | select(good, states, {k: state.extra[k] for k in states}),
            )
        with jax.named_scope("norms"):
            moved = {path: jnp.where(good, square, 0) for path, square in squared(updates).items()}
            squares = {"grad": seen, "update": moved, "param": squared(params)}
            norms = {f"{k}_norm": jnp.sqrt(sum(a.sum() for a in squares[k].values())) for k in ("grad", "update")}
        terms = terms | {name: LossTerm(value, jnp.ones(())) for name, value in (norms | {"total": total}).items()}
        return new, StepMetrics(terms, squares, {name: guard[name] for name in COUNTS})

    return step


def adapt(system: System, terms: dict[str, LossTerm], state: TrainState) -> tuple[dict[str, LossTerm], PyTree]:
    """The terms without the statistics for adaptive processes, and the updated states `{"states": …}`, or {}."""
    kept = {name: term for name, term in terms.items() if not name.endswith(STATISTICS)}
    if STATES not in state.extra:
        return kept, {}
    states = dict(state.extra[STATES])
    for row, old in states.items():
        own = [term for name, term in terms.items() if name.endswith(f"/{row}{STATISTICS}")]
        process = system.fields[row].process.bind(old)
        states[row] = process.update(old, sum(own[1:], own[0]), state.step) if own else old
    return kept, {STATES: states}


def squared(params: PyTree) -> dict[str, Array]:
    """Sums of squares by path, f32: `[L]` of the trunk's stacked layers, `[]` of the others."""

    def one(path: str, leaf: Array) -> Array:
        axes = tuple(range(1 if path.startswith(STACKED) else 0, leaf.ndim))
        return jnp.square(leaf.astype(jnp.float32)).sum(axes)

    return {path: one(path, leaf) for path, leaf in tree.flatten(params).items()}


def gradients(
    system: System,
    params: PyTree,
    drawn: Drawn,
    accumulate: int = 1,
    placement: Placement | None = None,
    add: Add = lambda x: x,
    fixed: PyTree = None,
) -> tuple[PyTree, dict[str, LossTerm], Array]:
    """Gradient of the weighted sum, the terms, and the sum itself, over `accumulate` microbatches of these rows.

    fixed   other parameters of the network, without gradient
    add     sum over the devices with other rows; terms are divided by the counts of all rows, so the results of the
            devices only need to be added
    """

    def forward(params, rows):
        return losses(system, tree.joined(params, fixed) if fixed else params, rows, placement)

    def part(params, counts, micro):
        terms = forward(params, micro)
        counts = {k: add(v.count) for k, v in terms.items()} if counts is None else counts
        return weighted_sum(system, terms, counts), terms

    def one(counts, micro):
        (total, terms), grads = jax.value_and_grad(part, has_aux=True)(params, counts, micro)
        return grads, terms, total

    if accumulate == 1:
        return one(None, drawn)

    # Counts do not depend on the network, so the compiler removes the rest of this forward pass.
    counts = {k: add(v.count) for k, v in forward(params, drawn).items()}
    micros = tree.split_rows(drawn, accumulate)
    shapes = jax.eval_shape(one, counts, jax.tree.map(lambda a: a[0], micros))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    sums, _ = jax.lax.scan(lambda carry, micro: (jax.tree.map(jnp.add, carry, one(counts, micro)), None), zeros, micros)
    return sums
