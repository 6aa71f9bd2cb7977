"""The checks before the first step of a new run.

Three rounds, each only if the one before found no error: config, devices and declared shapes; the first batch; up to
`STEPS` trial steps on it. These consume the state, which is then made again from its seed: a run with checks ends with
the same bits. With adaLN-zero every parameter has a gradient after three steps: head, gates, blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
import optax

from src.common.mesh.distributed import agree
from src.common.tree import flatten, listed
from src.doctor import batch_checks
from src.doctor.context import Check, CheckContext, check_context
from src.doctor.diagnostic import Diagnostic, error, errors, note, warning
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainable import multipliers
from src.train.trainer import Trainer

STEPS = 6
MAX_WEIGHT_RATIO = 8  # times that the share in the loss may be above the share in the rows
BATCH_CHECKS: tuple[Check, ...] = (
    batch_checks.values,
    batch_checks.targets,
    batch_checks.empty_attention,
    batch_checks.padding,
    batch_checks.unused_parts,
    batch_checks.unpredicted_names,
)


def check_run(
    trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]
) -> tuple[TrainState, list[Diagnostic]]:
    """Runs all checks. Returns a state equal to `state`, which may be donated, and the findings.

    state   as `trainer.init` makes it
    batch   the first one, on the devices
    """
    context = check_context(trainer, batch)
    jax.block_until_ready(state)  # `agree` between processes must not overlap with a running program
    found = check_before_steps(context)
    if not errors(found):
        state, steps = trial_steps(trainer, update, state, batch)
        context = dataclasses.replace(context, steps=steps)
        found += apply_checks(context, (nonfinite, untrained_objectives, zero_gradients))
    return state, found


def check_before_steps(context: CheckContext) -> list[Diagnostic]:
    """The first two rounds, which need no step."""
    found = apply_checks(context, (frozen, unsharded, few_rows, batch_checks.spec))
    return found if errors(found) else found + apply_checks(context, BATCH_CHECKS)


def apply_checks(context: CheckContext, checks: Sequence[Check]) -> list[Diagnostic]:
    """Findings of some checks; an error in one process is an error in all."""
    found = [finding for check in checks for finding in check(context)]
    reason = agree("; ".join(f.text for f in errors(found)))
    return found if errors(found) or not reason else [*found, error(reason)]


def trial_steps(
    trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]
) -> tuple[TrainState, tuple[StepMetrics, ...]]:
    """A fresh state, and the metrics of steps on one batch until every parameter got a gradient, at most `STEPS`.
    They run at the highest learning rate: behind layers of zeros, gradients grow with the first updates."""
    state = state.replace(opt_state=at_peak(state.opt_state, trainer.system.config.optim.warmup))
    steps: list[StepMetrics] = []
    while len(steps) < STEPS and (not steps or _without(trainer, steps)):
        state, measured = update(state, batch)
        steps.append(jax.device_get(measured))
    del state  # two states may not fit into memory
    return jax.block_until_ready(trainer.init()), tuple(steps)


def at_peak(opt_state: optax.OptState, step: int) -> optax.OptState:
    """The optimizer's state with `step` as the position in the learning rate schedule; moments unchanged."""

    def place(node: object) -> object:
        if not isinstance(node, optax.ScaleByScheduleState):
            return node
        return node._replace(count=jax.device_put(np.asarray(step, node.count.dtype), node.count.sharding))

    return jax.tree.map(place, opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


# --------------------------------------------------------------------------- from config and devices


def frozen(context: CheckContext) -> list[Diagnostic]:
    """Parameters frozen by `optim.lr_multipliers` or `model.lora`."""
    paths, adapted = _frozen(context.trainer), context.system.config.model.lora.rank
    what = "model.lora and optim.lr_multipliers freeze" if adapted else "optim.lr_multipliers freezes"
    return [note(f"{what} {len(paths)} tensors: {listed(paths)}")] if paths else []


def unsharded(context: CheckContext) -> list[Diagnostic]:
    """Large parameters that are replicated although the mesh could shard them."""
    mesh = context.trainer.mesh
    ways = mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1)
    if ways == 1:
        return []
    least = context.system.config.sharding.min_size
    whole = {
        path: math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in flatten(context.trainer.abstract.params).items()
        if math.prod(leaf.shape) >= least and not any(leaf.sharding.spec)
    }
    if not whole:
        return []
    mib = sum(whole.values()) / 2**20
    return [
        warning(
            f"no axis of the mesh splits {listed(sorted(whole, key=whole.get, reverse=True))}: every device holds them"
            f" whole, {mib:.1f} MiB without gradients and moments; give them sizes that mesh.fsdp={mesh.shape['fsdp']}"
            " divides, or a rule in sharding.tensor"
        )
    ]


def few_rows(context: CheckContext) -> list[Diagnostic]:
    """Tasks whose share of the rows is far below their share of the loss's weight: their gradients are noisy."""
    plans = context.system.tasks
    weights = {task: sum(weight for _, weight in plan.objectives.values()) for task, plan in plans.items()}
    found = []
    for task, plan in plans.items():
        loss, rows = weights[task] / (sum(weights.values()) or 1), plan.rows / sum(p.rows for p in plans.values())
        if loss > MAX_WEIGHT_RATIO * rows:
            found.append(
                warning(
                    f"task {task} has too few rows: {plan.rows} row(s), {rows:.1%} of the batch, with {loss:.0%} of"
                    f" the loss's weight: raise tasks.{task}.weight, or lower the weight of its objectives"
                )
            )
        if not weights[task]:
            found.append(warning(f"the objectives of task {task} have weight 0, so it trains nothing: remove it"))
    return found


# --------------------------------------------------------------------------- from the trial steps


def nonfinite(context: CheckContext) -> list[Diagnostic]:
    """Losses and gradients of the first trial step that are not finite."""
    first = context.steps[0]
    terms = [name for name, term in first.terms.items() if not np.isfinite(term.total)]
    paths = [path for path, squares in first.squares["grad"].items() if not np.isfinite(squares).all()]
    if not terms and not paths:
        return []
    what = [listed(names) for names in (terms, [f"the gradient of {p}" for p in paths]) if names]
    return [error(f"NaN or infinite at the first step: {'; '.join(what)}; check model.dtype and the initial values")]


def untrained_objectives(context: CheckContext) -> list[Diagnostic]:
    """Objectives, or names of one with several, without a target in the batch."""
    tasks, bad = context.system.tasks, batch_checks.bad_batches(context)
    found = [
        warning(
            f"all {tasks[task].rows} rows of task {task} in the first batch are bad, so that nothing of"
            " it is learned there: correct the rows that skipped.jsonl lists, or raise batch"
        )
        for task in bad
    ]
    idle = {}
    for path, term in context.steps[0].terms.items():
        task, _, rest = path.partition("/")
        objective, *name, _ = rest.split("/") if rest.count("/") else ("",) * 2
        label = f"{task}/{objective}"
        if label in context.system.weights and term.trained and not term.count and task not in bad:
            what = f"objective {label} has no target{f' in {name[0]}' if name else ''}"
            idle[what] = f"in the first batch ({tasks[task].rows} rows)"
    return found + [error(f"{what} {where}: mark targets in its names, or remove it") for what, where in idle.items()]


def zero_gradients(context: CheckContext) -> list[Diagnostic]:
    """Parameters, or layers of them, whose gradient is zero in all trial steps."""
    if nonfinite(context) or batch_checks.bad_batches(context):
        return []
    leaves = flatten(context.trainer.abstract.params)
    names, count = [], 0
    for path, layers in _without(context.trainer, context.steps).items():
        of = context.steps[0].squares["grad"][path].size
        count += math.prod(leaves[path].shape) * layers.size // of
        names.append(path if layers.size == of else f"{path} (layers {listed(layers)})")
    if not names:
        return []
    return [
        warning(
            f"no objective trains {len(names)} tensors ({count:,} numbers), whose gradient is 0 in"
            f" {len(context.steps)} steps on the first batch: {listed(names)}; connect them, initialize them to other"
            " values than 0, or freeze them (optim.lr_multipliers) to save their moments"
        )
    ]


def _without(trainer: Trainer, steps: Sequence[StepMetrics]) -> dict[str, np.ndarray]:
    """Layers whose gradient was zero in all steps, by path (0 for a parameter without layers); without frozen ones.

    A gradient that is not finite counts as zero: it may come from the high learning rate.
    """
    kept, found = set(_frozen(trainer)), {}
    for path in steps[0].squares["grad"].keys() - kept:
        squares = np.stack([np.atleast_1d(step.squares["grad"][path]) for step in steps])
        layers = np.flatnonzero(~np.any((squares > 0) & (squares < np.inf), axis=0))
        if layers.size:
            found[path] = layers
    return dict(sorted(found.items()))


def _frozen(trainer: Trainer) -> list[str]:
    shares = multipliers(trainer.system.config, flatten(trainer.abstract.params))
    return [path for path, share in shares.items() if share == 0]
