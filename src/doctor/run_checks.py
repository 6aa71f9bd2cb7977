"""The checks before the first step of a new run.

Three rounds, each only where the one before found no error: what config, devices and declared shapes tell; what the
first batch tells; what some steps on it tell. The steps use the state up, and it is made anew from its seed: a run
with checks is the run without them, bit for bit. They cost up to `STEPS` steps and one more initialisation; most
systems need three (adaLN-zero opens in this order: head, gates, blocks).
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
from src.doctor.context import Case, Check, open_case
from src.doctor.diagnostic import Finding, error, errors, note, warning
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainable import rates
from src.train.trainer import Trainer

STEPS = 6
STARVED = 8  # times that the share in the loss may be above the share in the rows
SCREENS: tuple[Check, ...] = (
    batch_checks.values,
    batch_checks.targets,
    batch_checks.blind,
    batch_checks.padding,
    batch_checks.vacant,
    batch_checks.given,
)


def examine(
    trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]
) -> tuple[TrainState, list[Finding]]:
    """A state equal to `state`, which may be used up, and what all checks found.

    state   a fresh one, as `trainer.init` makes it
    batch   the first one, on the devices
    """
    case = open_case(trainer, batch)
    jax.block_until_ready(state)  # processes may agree only while nothing runs
    found = look_over(case)
    if not errors(found):
        state, steps = trial(trainer, update, state, batch)
        found += screen(dataclasses.replace(case, steps=steps), (finite, idle, dead))
    return state, found


def look_over(case: Case) -> list[Finding]:
    """What the checks find that need no step: the first two rounds."""
    found = screen(case, (frozen, unsplit, starved, batch_checks.spec))
    return found if errors(found) else found + screen(case, SCREENS)


def screen(case: Case, checks: Sequence[Check]) -> list[Finding]:
    """What some checks find; every process learns of an error on any of them."""
    found = [finding for check in checks for finding in check(case)]
    reason = agree("; ".join(f.text for f in errors(found)))
    return found if errors(found) or not reason else [*found, error(reason)]


def trial(
    trainer: Trainer, update: Step, state: TrainState, batch: Mapping[str, Batch]
) -> tuple[TrainState, tuple[StepMetrics, ...]]:
    """A fresh state, and what some steps on one batch measured: as many as it takes every parameter to get a gradient,
    at most `STEPS`. They run at the highest learning rate, since gradients behind zeros grow with what it has moved."""
    state = state.replace(opt_state=at_peak(state.opt_state, trainer.system.config.optim.warmup))
    steps: list[StepMetrics] = []
    while len(steps) < STEPS and (not steps or _without(trainer, steps)):
        state, measured = update(state, batch)
        steps.append(jax.device_get(measured))
    del state  # two of them might not fit
    return jax.block_until_ready(trainer.init()), tuple(steps)


def at_peak(opt_state: optax.OptState, step: int) -> optax.OptState:
    """The optimizer's state with its learning rate at `step` of the schedule; the moments are as they were."""

    def place(node: object) -> object:
        if not isinstance(node, optax.ScaleByScheduleState):
            return node
        return node._replace(count=jax.device_put(np.asarray(step, node.count.dtype), node.count.sharding))

    return jax.tree.map(place, opt_state, is_leaf=lambda node: isinstance(node, optax.ScaleByScheduleState))


# --------------------------------------------------------------------------- from config and devices


def frozen(case: Case) -> list[Finding]:
    """Parameters that `optim.lr_multipliers`, or the adapters of `model.lora`, keep as they are."""
    paths, adapted = _frozen(case.trainer), case.system.config.model.lora.rank
    what = "model.lora and optim.lr_multipliers freeze" if adapted else "optim.lr_multipliers freezes"
    return [note(f"{what} {len(paths)} tensors: {listed(paths)}")] if paths else []


def unsplit(case: Case) -> list[Finding]:
    """Large parameters that every device holds whole although the mesh could split them."""
    mesh = case.trainer.mesh
    ways = mesh.shape.get("fsdp", 1) * mesh.shape.get("tensor", 1)
    if ways == 1:
        return []
    least = case.system.config.sharding.min_size
    whole = {
        path: math.prod(leaf.shape) * leaf.dtype.itemsize
        for path, leaf in flatten(case.trainer.abstract.params).items()
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


def starved(case: Case) -> list[Finding]:
    """Tasks with far fewer of the batch's rows than of the loss's weight: their gradient is mostly noise."""
    plans = case.system.tasks
    weights = {task: sum(weight for _, weight in plan.objectives.values()) for task, plan in plans.items()}
    found = []
    for task, plan in plans.items():
        loss, rows = weights[task] / (sum(weights.values()) or 1), plan.rows / sum(p.rows for p in plans.values())
        if loss > STARVED * rows:
            found.append(
                warning(
                    f"the batch starves task {task}: {plan.rows} row(s), {rows:.1%} of the batch, carry {loss:.0%} of"
                    f" the loss's weight: raise tasks.{task}.weight, or lower the weight of its objectives"
                )
            )
        if not weights[task]:
            found.append(warning(f"task {task} has the weight 0: nothing is learned from it; leave it out"))
    return found


# --------------------------------------------------------------------------- from the trial steps


def finite(case: Case) -> list[Finding]:
    """Losses and gradients of the first step that are not finite."""
    first = case.steps[0]
    terms = [name for name, term in first.terms.items() if not np.isfinite(term.total)]
    paths = [path for path, squares in first.squares["grad"].items() if not np.isfinite(squares).all()]
    if not terms and not paths:
        return []
    what = [listed(names) for names in (terms, [f"the gradient of {p}" for p in paths]) if names]
    return [error(f"NaN or infinite at the first step: {'; '.join(what)}; look at model.dtype and the initial values")]


def idle(case: Case) -> list[Finding]:
    """Objectives that count nothing in the batch, and so train nothing."""
    weights, found = case.system.weights, []
    for name, term in case.steps[0].terms.items():
        label = name.rpartition("/")[0]
        if label in weights and term.trained and not term.count:
            rows = case.system.tasks[name.partition("/")[0]].rows
            found.append(
                error(
                    f"objective {label} counts nothing in the first batch ({rows} rows): mark targets in the names"
                    " that it has, or leave it out"
                )
            )
    return found


def dead(case: Case) -> list[Finding]:
    """Parameters, or layers of them, that no objective of any task gives a gradient."""
    if finite(case):
        return []
    leaves = flatten(case.trainer.abstract.params)
    names, count = [], 0
    for path, layers in _without(case.trainer, case.steps).items():
        of = case.steps[0].squares["grad"][path].size
        count += math.prod(leaves[path].shape) * layers.size // of
        names.append(path if layers.size == of else f"{path} (layers {listed(layers)})")
    if not names:
        return []
    return [
        warning(
            f"no objective trains {len(names)} tensors ({count:,} numbers), whose gradient is 0 in"
            f" {len(case.steps)} steps on the first batch: {listed(names)}; connect them, start them at other values"
            " than 0, or freeze them (optim.lr_multipliers) to save their moments"
        )
    ]


def _without(trainer: Trainer, steps: Sequence[StepMetrics]) -> dict[str, np.ndarray]:
    """By path, the layers (0 where there are none) whose gradient was zero in all steps; the frozen are left out.

    A gradient that is not finite, as a rate that is too high makes them after a while, is no sign of life.
    """
    kept, found = set(_frozen(trainer)), {}
    for path in steps[0].squares["grad"].keys() - kept:
        squares = np.stack([np.atleast_1d(step.squares["grad"][path]) for step in steps])
        layers = np.flatnonzero(~np.any((squares > 0) & (squares < np.inf), axis=0))
        if layers.size:
            found[path] = layers
    return dict(sorted(found.items()))


def _frozen(trainer: Trainer) -> list[str]:
    shares = rates(trainer.system.config, flatten(trainer.abstract.params))
    return [path for path, share in shares.items() if share == 0]
