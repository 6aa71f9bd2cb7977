"""`--mode=doctor`: the checks and a short rehearsal of a config, without a run, and a report with advice."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from src.doctor.batch_checks import spec
from src.doctor.callback import make_doctor
from src.doctor.context import open_case
from src.doctor.diagnostic import SEVERITIES, Finding, errors
from src.doctor.dry_run import Rehearsal, advise, rehearse
from src.doctor.memory import GIB, check_encoding, check_step, room
from src.doctor.run_checks import SCREENS, examine, look_over
from src.train.system import System
from src.train.trainer import Trainer, make_trainer, open_data

STEPS = 20


@dataclasses.dataclass(frozen=True)
class Report:
    """What the doctor says."""

    text: str
    findings: tuple[Finding, ...]


def consult(system: System, steps: int = STEPS, devices: Sequence[Any] | None = None) -> Report:
    """Checks and rehearses a system on all devices, or on these. Nothing is written.

    Raises ValueError when the compiled step does not fit into memory, or the mesh does not fit the devices.
    """
    config = system.config
    steps = min(steps, config.steps)
    trainer = make_trainer(system, devices)
    seen = memory = None
    with contextlib.closing(open_data(trainer)) as data, jax.set_mesh(trainer.mesh):
        check_encoding(trainer)
        first = trainer.place(next(data), 0)
        found = look_over(open_case(trainer, first))
        if not errors(found):  # before the step compiles, which may take minutes
            update = trainer.compile()
            memory = check_step(trainer, update)
            state, found = examine(trainer, update, trainer.init(), first)
        if not errors(found):
            watchers = make_doctor(trainer, every=steps).watchers  # what is measured seldom is measured at the end
            seen = rehearse(trainer, update, state, data, steps, watchers, (spec, *SCREENS))
            found += advise(trainer, seen)
    return Report("\n".join(_lines(trainer, found, seen, memory)), tuple(found))


def _lines(trainer: Trainer, found: list[Finding], seen: Rehearsal | None, memory: int | None) -> list[str]:
    counts = ", ".join(f"{sum(f.severity == s for f in found)} {s}s" for s in SEVERITIES)
    said = [f"  {finding}" for severity in SEVERITIES for finding in found if finding.severity == severity]
    lines = [f"doctor: {counts}", *said]
    if seen is None or not seen.losses:
        return [*lines, "no rehearsal: mend the errors first"]
    plans = trainer.system.tasks.values()
    tokens, have = sum(p.rows * p.layout.length for p in plans), room()
    share = seen.data / (seen.data + seen.step)
    devices = trainer.mesh.devices
    lines += [
        f"rehearsal: {len(seen.losses)} steps on {devices.size} {devices.flat[0].platform} device(s)",
        f"  a step        {_time(seen.step)}, {tokens / seen.step:,.0f} tokens/s",
        f"  its data      {_time(seen.data)}, {share:.1%} of both; a run fetches beside the step",
    ]
    if memory is not None:
        free = "" if have is None else f", {have / GIB:.2f} GiB are free"
        lines.append(f"  memory        {memory / GIB:.2f} GiB a device{free}")
    ends = seen.ends()
    lines += [f"  {'' if n == 'loss' else 'loss/'}{n}: {a:.4g} -> {b:.4g}" for n, (a, b) in ends.items()]
    ratios = _short([(part, f"{ratio:.1e}") for part, ratio in seen.ratios.items()])
    rate = f"  update / weights at the highest learning rate, {trainer.system.config.optim.lr:g}: {ratios}"
    pulls = {k: v for k, v in seen.watched.items() if k.startswith("pull/")}
    return [*lines, rate, *(f"  {name}: {value:.3g}" for name, value in pulls.items())]


def _short(pairs: list[tuple[str, str]], most: int = 16) -> str:
    """Some of many, from the first to the last."""
    keep = np.unique(np.linspace(0, len(pairs) - 1, min(most, len(pairs))).round().astype(int))
    return ", ".join(f"{pairs[i][0]} {pairs[i][1]}" for i in keep)


def _time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{seconds * 1e3:.1f} ms"
