"""Some steps of a run, measured, and what they advise."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from src.common.tree import listed
from src.doctor import layer_stats
from src.doctor.callback import Watcher
from src.doctor.context import Check, open_case
from src.doctor.diagnostic import Finding, error, errors, warning
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainer import Trainer

# Choices, not measurements: where advice begins.
HIGH = {"float32": 0.1, "bfloat16": 0.05}  # |update| / |weights| of a step, by the dtype of the computation
WAITING = 0.5  # share of the data in the time of step and data: a run fetches beside the step, and waits above it
WEAK = 0.05  # share of one objective in the gradient of the trunk
RISE = 1.2  # last loss / first
WARM = 0.1  # share of the highest learning rate below which a head of zeros is still closed


@dataclasses.dataclass(frozen=True)
class Rehearsal:
    """What some steps showed.

    losses    by step: "loss" (the weighted sum) and every term, means
    step      median seconds of a step; `data`: of fetching its batch, which a run does beside the step before
    ratios    |update| / |weights| by part of the model, at the highest learning rate of the schedule: updates are
              proportional to it
    watched   what the doctor's watchers say after the last step
    findings  errors of the batches on the way
    """

    losses: tuple[Mapping[str, float], ...]
    step: float
    data: float
    ratios: Mapping[str, float]
    watched: Mapping[str, float]
    findings: tuple[Finding, ...] = ()

    def ends(self) -> dict[str, tuple[float, float]]:
        """Means over the first and the last quarter of the steps, by loss."""
        size = max(len(self.losses) // 4, 1)
        mean = lambda rows, name: statistics.fmean(row.get(name, math.nan) for row in rows)
        return {n: (mean(self.losses[:size], n), mean(self.losses[-size:], n)) for n in self.losses[0]}


def rehearse(
    trainer: Trainer,
    update: Step,
    state: TrainState,
    data: Iterator[Mapping[str, Batch]],
    steps: int,
    watchers: Sequence[Watcher] = (),
    screens: Sequence[Check] = (),
) -> Rehearsal:
    """Runs `steps` steps one by one, each to its end; every batch goes through `screens`, and an error ends it."""
    losses, times, found, ratios = [], [], [], {}
    batch = measured = None
    for step in range(steps):
        began = time.monotonic()
        rows = next(data)
        fetched = time.monotonic()
        batch = trainer.place(rows, step)
        case = open_case(trainer, batch)
        found = errors([finding for check in screens for finding in check(case)])
        if found:
            break
        started = time.monotonic()
        state, measured = update(state, batch)
        jax.block_until_ready((state, measured))
        times.append((time.monotonic() - started, fetched - began))
        losses.append(means(measured))
        rate = float(trainer.schedule(step))
        if rate > 0:
            squares = jax.device_get(measured.squares)
            of_step = layer_stats.ratios(squares["update"], squares["param"])
            ratios = {part: ratio * trainer.system.config.optim.lr / rate for part, ratio in of_step.items()}
    watched: dict[str, float] = {}
    for watch in watchers if losses and not found else ():
        watched |= watch(len(losses), state, batch, measured)
    times = times or [(math.nan, math.nan)]
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return Rehearsal(tuple(losses), *medians, ratios, watched, tuple(found))


def means(measured: StepMetrics) -> dict[str, float]:
    """Losses of one step by name, "loss" first."""
    terms = {k: t for k, t in jax.device_get(measured.terms).items() if t.trained and t.count}
    losses = {k: float(t.total) / float(t.count) for k, t in terms.items() if k == "total" or "/" in k}
    return {"loss": losses.pop("total")} | losses


# --------------------------------------------------------------------------- advice


def advise(trainer: Trainer, seen: Rehearsal) -> list[Finding]:
    """What to change, from one rehearsal."""
    config = trainer.system.config
    return [*seen.findings, *_losses(seen), *_rate(config, seen), *_balance(trainer, seen), *_waiting(seen)]


def _losses(seen: Rehearsal) -> list[Finding]:
    if not seen.losses:
        return []
    bad = sorted({name for row in seen.losses for name, value in row.items() if not math.isfinite(value)})
    if bad:
        return [error(f"{listed(bad)} became NaN or infinite within {len(seen.losses)} steps: lower optim.lr")]
    first, last = seen.ends()["loss"]
    if first > 0 and last > RISE * first:
        return [warning(f"the loss rose from {first:.4g} to {last:.4g}: lower optim.lr, or raise optim.warmup")]
    return []


def _rate(config: Any, seen: Rehearsal) -> list[Finding]:
    # Heads and gates that begin at zero have no size yet to compare with.
    most = HIGH[config.model.dtype]
    high = {part: ratio for part, ratio in seen.ratios.items() if part.startswith("block_") and ratio > most}
    if not high:
        return []
    worst = max(high, key=high.get)
    return [
        warning(
            f"at the highest learning rate, optim.lr={config.optim.lr:g}, a step changes {worst} by {high[worst]:.0%}"
            f" of its weights, above {most:.0%} for {config.model.dtype}: lower optim.lr"
        )
    ]


def _balance(trainer: Trainer, seen: Rehearsal) -> list[Finding]:
    if float(trainer.schedule(max(len(seen.losses) - 1, 0))) < WARM * trainer.system.config.optim.lr:
        return []
    norms = {name.removeprefix("pull/norm/"): v for name, v in seen.watched.items() if name.startswith("pull/norm/")}
    weak = {name: norm / sum(norms.values()) for name, norm in norms.items() if norm < WEAK * sum(norms.values())}
    return [
        warning(f"objective {name} gives {share:.1%} of the gradient on the trunk: raise its weight, or it learns last")
        for name, share in weak.items()
    ]


def _waiting(seen: Rehearsal) -> list[Finding]:
    share = seen.data / (seen.data + seen.step)
    if not share > WAITING:
        return []
    return [
        warning(
            f"a run would wait for its data, which take {share:.0%} of the time of step and data: raise data.workers,"
            " or make reading cheaper"
        )
    ]
