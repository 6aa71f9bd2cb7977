"""`--mode=doctor`: the checks and a dry run of a config, and a report with advice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from src.doctor.batch_checks import spec
from src.doctor.callback import make_doctor
from src.doctor.context import check_context
from src.doctor.diagnostic import SEVERITIES, Diagnostic, errors
from src.doctor.dry_run import DryRun, advise, run_steps
from src.doctor.memory import GIB, check_encoding, check_step, free_memory
from src.doctor.run_checks import BATCH_CHECKS, check_before_steps, check_run
from src.train.system import System
from src.train.trainer import Trainer, make_trainer, open_data

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Report:
    """The text that `--mode=doctor` prints, and its diagnostics."""

    text: str
    findings: tuple[Diagnostic, ...]


def diagnose(system: System, steps: int = STEPS, devices: Sequence[Any] | None = None) -> Report:
    """Checks a system and runs at most `steps` steps, on all devices or on these. Writes nothing.

    Raises ValueError when the compiled step does not fit into memory, or the mesh does not fit the devices.
    """
    config = system.config
    steps = min(steps, config.steps)
    trainer = make_trainer(system, devices)
    seen = memory = None
    with contextlib.closing(open_data(trainer)) as data, jax.set_mesh(trainer.mesh):
        check_encoding(trainer)
        first = trainer.place(next(data), 0)
        found = check_before_steps(check_context(trainer, first))
        if not errors(found):  # before the step compiles, which may take minutes
            update = trainer.compile()
            memory = check_step(trainer, update)
            state, found = check_run(trainer, update, trainer.init(), first)
        if not errors(found):
            measurements = make_doctor(trainer, every=steps).measurements  # all of them are due at the end
            seen = run_steps(trainer, update, state, data, steps, measurements, (spec, *BATCH_CHECKS))
            found += advise(trainer, seen)
    return Report("\n".join(_lines(trainer, found, seen, memory)), tuple(found))


def _lines(trainer: Trainer, found: list[Diagnostic], seen: DryRun | None, memory: int | None) -> list[str]:
    counts = ", ".join(f"{sum(f.severity == s for f in found)} {s}s" for s in SEVERITIES)
    said = [f"  {finding}" for severity in SEVERITIES for finding in found if finding.severity == severity]
    lines = [f"doctor: {counts}", *said]
    if seen is None or not seen.losses:
        return [*lines, "no dry run: correct the errors first"]
    plans = trainer.system.tasks.values()
    tokens, have = sum(p.rows * p.layout.length for p in plans), free_memory()
    share = seen.data / (seen.data + seen.step)
    devices = trainer.mesh.devices
    lines += [
        f"dry run: {len(seen.losses)} steps on {devices.size} {devices.flat[0].platform} device(s)",
        f"  a step        {_time(seen.step)}, {tokens / seen.step:,.0f} tokens/s",
        f"  its data      {_time(seen.data)}, {share:.1%} of both; training fetches it during the step before",
    ]
    if memory is not None:
        free = "" if have is None else f", {have / GIB:.2f} GiB are free"
        lines.append(f"  memory        {memory / GIB:.2f} GiB a device{free}")
    ends = seen.ends()
    lines += [f"  {'' if n == 'loss' else 'loss/'}{n}: {a:.4g} -> {b:.4g}" for n, (a, b) in ends.items()]
    ratios = _short([(part, f"{ratio:.1e}") for part, ratio in seen.ratios.items()])
    rate = f"  update / weights at the highest learning rate, {trainer.system.config.optim.lr:g}: {ratios}"
    conflict = {k: v for k, v in seen.scalars.items() if k.startswith("conflict/")}
    return [*lines, rate, *(f"  {name}: {value:.3g}" for name, value in conflict.items())]


def _short(pairs: list[tuple[str, str]], most: int = 16) -> str:
    """At most `most` of the pairs, evenly spaced, as text."""
    keep = np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int))
    return ", ".join(f"{pairs[i][0]} {pairs[i][1]}" for i in keep)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
