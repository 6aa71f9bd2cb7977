"""A dry run: some steps of training with measurements, and advice."""

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
from src.doctor.callback import Measurement
from src.doctor.context import Check, check_context
from src.doctor.diagnostic import Diagnostic, error, errors, warning
from src.interfaces import Batch
from src.train.state import TrainState
from src.train.step import Step, StepMetrics
from src.train.trainer import Trainer

# Thresholds of the advice: choices, not measurements.
HIGH = {"float32": 0.1, "bfloat16": 0.05}  # |update| / |weights| of a step, by the dtype of the computation
WAITING = 0.5  # data / (step + data), in time; a run fetches during the step, so it waits only above 0.5
WEAK = 0.05  # share of one objective in the trunk's gradient norms
RISE = 1.2  # last loss / first
WARM = 0.1  # learning rate / highest; below it a head that starts at zero passes almost no gradient to the trunk


@dataclasses.dataclass(frozen=True)
class DryRun:
    """Measurements of some steps.

    losses    by step: "loss" (the weighted sum) and every term, means
    step      median seconds of a step
    data      median seconds to fetch a batch; a run does this during the step before
    ratios    |update| / |weights| by part of the model, scaled to the highest learning rate of the schedule
    scalars   the log measurements after the last step
    findings  errors of a batch that ended the dry run
    """

    losses: tuple[Mapping[str, float], ...]
    step: float
    data: float
    ratios: Mapping[str, float]
    scalars: Mapping[str, float]
    findings: tuple[Diagnostic, ...] = ()

    def ends(self) -> dict[str, tuple[float, float]]:
        """Means over the first and the last quarter of the steps, by loss."""
        size = max(len(self.losses) // 4, 1)
        mean = lambda rows, name: statistics.fmean(row.get(name, math.nan) for row in rows)
        return {n: (mean(self.losses[:size], n), mean(self.losses[-size:], n)) for n in self.losses[0]}


def run_steps(
    trainer: Trainer,
    update: Step,
    state: TrainState,
    data: Iterator[Mapping[str, Batch]],
    steps: int,
    measurements: Sequence[Measurement] = (),
    checks: Sequence[Check] = (),
) -> DryRun:
    """Runs and times `steps` steps. Every batch goes through `checks`; the first error ends the dry run."""
    losses, times, found, ratios = [], [], [], {}
    batch = measured = None
    for step in range(steps):
        began = time.monotonic()
        rows = next(data)
        fetched = time.monotonic()
        batch = trainer.place(rows, step)
        context = check_context(trainer, batch)
        found = errors([finding for check in checks for finding in check(context)])
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
    scalars: dict[str, float] = {}
    for watch in measurements if losses and not found else ():
        scalars |= watch(len(losses), state, batch, measured)
    times = times or [(math.nan, math.nan)]
    medians = (statistics.median(column) for column in zip(*times, strict=True))
    return DryRun(tuple(losses), *medians, ratios, scalars, tuple(found))


def means(measured: StepMetrics) -> dict[str, float]:
    """Mean losses of one step by name, "loss" first."""
    terms = {k: t for k, t in jax.device_get(measured.terms).items() if t.trained and t.count}
    losses = {k: float(t.total) / float(t.count) for k, t in terms.items() if k == "total" or "/" in k}
    return {"loss": losses.pop("total")} | losses


# --------------------------------------------------------------------------- advice


def advise(trainer: Trainer, seen: DryRun) -> list[Diagnostic]:
    """Errors of a dry run, and advice on learning rate, weights and data loading."""
    config = trainer.system.config
    return [*seen.findings, *_losses(seen), *_rate(config, seen), *_balance(trainer, seen), *_waiting(seen)]


def _losses(seen: DryRun) -> list[Diagnostic]:
    if not seen.losses:
        return []
    bad = sorted({name for row in seen.losses for name, value in row.items() if not math.isfinite(value)})
    if bad:
        return [error(f"{listed(bad)} became NaN or infinite within {len(seen.losses)} steps: lower optim.lr")]
    first, last = seen.ends()["loss"]
    if first > 0 and last > RISE * first:
        return [warning(f"the loss rose from {first:.4g} to {last:.4g}: lower optim.lr, or raise optim.warmup")]
    return []


def _rate(config: Any, seen: DryRun) -> list[Diagnostic]:
    # Only blocks: heads and gates that start at zero have no meaningful ratio yet.
    most = HIGH[config.model.dtype]
    high = {part: ratio for part, ratio in seen.ratios.items() if part.startswith("block_") and ratio > most}
    if not high:
        return []
    worst = max(high, key=high.get)
    return [
        warning(
            f"at the highest learning rate, optim.lr={config.optim.lr:g}, a step changes {worst} by {high[worst]:.0%}"
            f" of its norm, above {most:.0%} for {config.model.dtype}: lower optim.lr"
        )
    ]


def _balance(trainer: Trainer, seen: DryRun) -> list[Diagnostic]:
    if float(trainer.schedule(max(len(seen.losses) - 1, 0))) < WARM * trainer.system.config.optim.lr:
        return []
    prefix = "conflict/norm/"
    norms = {name.removeprefix(prefix): v for name, v in seen.scalars.items() if name.startswith(prefix)}
    weak = {name: norm / sum(norms.values()) for name, norm in norms.items() if norm < WEAK * sum(norms.values())}
    return [
        warning(f"objective {name} gives {share:.1%} of the gradient on the trunk: raise its weight")
        for name, share in weak.items()
    ]


def _waiting(seen: DryRun) -> list[Diagnostic]:
    share = seen.data / (seen.data + seen.step)
    if not share > WAITING:
        return []
    return [
        warning(
            f"training would wait for data: fetching takes {share:.0%} of the time of step and data; raise"
            " data.workers, or make reading cheaper"
        )
    ]
