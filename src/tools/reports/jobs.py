"""Runs of `src.main` one after another, each in a process of its own: what is done is not repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

from src.common.files.store import write_named
from src.common.files.strict_json import read_json
from src.common.runtime.config_keys import CONFIGS
from src.tools.reports.ablations import ARMS, BEGUN, TEXT
from src.tools.reports.run_files import METRICS, read_metrics
from src.train.checkpoints.metadata import VERSION

DONE = "done.json"
STEP = re.compile(r"\bstep (\d+)/(\d+)")
PROGRESS = 10.0  # seconds between two lines about one run
KNOWN = 0.3  # share of the first run from which on the time of all is estimated: before, it is mostly compilation
LINES = 5  # of the output of a run that failed


@dataclasses.dataclass(frozen=True)
class TrainingJob:
    """A run and the commands that make it: words behind `python -m`. `weight` is its share of the work."""

    arm: str
    seed: int
    workdir: str
    commands: tuple[tuple[str, ...], ...]
    weight: float = 1.0

    @property
    def name(self) -> str:
        """Of its folder."""
        return os.path.basename(self.workdir)


def jobs_of(
    workdir: str, seeds: Sequence[int], steps: int | None, debug: bool, devices: int | None
) -> list[TrainingJob]:
    """The runs of all arms, seed by seed, so that what is done first is of all arms."""
    found = []
    for seed in seeds:
        text = os.path.join(workdir, f"{TEXT}-{seed}")
        initial = os.path.join(text, "initial")
        for arm, variant in {TEXT: TEXT, **ARMS}.items():
            folder = os.path.join(workdir, f"{arm}-{seed}")
            words = [word for word in (variant, "debug" if debug else "") if word]
            file = os.path.join(CONFIGS, "ablations_digits.py") + (f":{','.join(words)}" if words else "")
            train = ["src.main", f"--config={file}", f"--workdir={folder}", f"--config.seed={seed}"]
            train += [f"--config.steps={steps}"] if steps else []
            train += [f"--cpu_devices={devices}"] if devices else []
            train += [f"--config.init_from.path={initial}"] if arm == BEGUN else []
            commands = [tuple(train)]
            if arm == TEXT:
                commands += [("src.tools.convert", f"--source={folder}", f"--out={initial}", "--initial", "--ema")]
            found.append(TrainingJob(arm, seed, folder, tuple(commands), 0.3 if arm == TEXT else 1.0))
    return found


def run_all(jobs: Sequence[TrainingJob], logs: str, say: Callable[[str], None]) -> None:
    """Runs the jobs that are not done, and says how far they are and about how long the rest takes.

    Raises ValueError, before anything runs, where a job's folder has a run of another command, RuntimeError for a run
    that failed.
    """
    waiting = [job for job in jobs if not is_done(job)]
    if len(waiting) < len(jobs):
        say(f"{len(jobs) - len(waiting)} of {len(jobs)} runs are done already")
    os.makedirs(logs, exist_ok=True)
    began, whole, done = time.monotonic(), sum(job.weight for job in waiting), 0.0
    for number, job in enumerate(waiting, 1):
        start, last = time.monotonic(), 0.0
        say(f"run {number} of {len(waiting)}: {job.name}")
        for share, text in _run(job, os.path.join(logs, f"{job.name}.log")):
            now, part = time.monotonic(), done + job.weight * share
            if now - last >= PROGRESS and part:
                last = now
                left = (
                    f"about {(now - began) / part * (whole - part) / 60:.1f} minutes" if share > KNOWN or done else "?"
                )
                say(f"  {job.name}: {text}; {left} left of all")
        done += job.weight
        _note(job, time.monotonic() - start)


def is_done(job: TrainingJob) -> bool:
    """Whether a job has run to its end. Raises ValueError where its folder has a run of another command."""
    told = read_done(job)
    if told and told.get("commands") != _plain(job):
        raise ValueError(
            f"{job.workdir} has a run of other settings: give another --workdir, or the flags of that run "
            f"({os.path.join(job.workdir, DONE)})"
        )
    return bool(told)


def read_done(job: TrainingJob) -> dict[str, Any]:
    """What was noted at the end of a job: its commands, seconds, and the version of the code; {} before it."""
    path = os.path.join(job.workdir, DONE)
    return read_json(path, what="record") if os.path.exists(path) else {}


def about_machine() -> dict[str, str]:
    """What numbers may depend on."""
    about = {"Python": ".".join(map(str, sys.version_info[:3])), "jax": version("jax"), "code": VERSION}
    return about | {"cores": str(os.cpu_count())}


def _note(job: TrainingJob, seconds: float) -> None:
    numbers, _ = read_metrics(os.path.join(job.workdir, METRICS))
    told = {"commands": _plain(job), "seconds": float(numbers.get("seconds_total", seconds))}
    told |= {"version": VERSION, "time": time.strftime("%Y-%m-%d %H:%M:%S")}
    write_named(os.path.join(job.workdir, DONE), (json.dumps(told, indent=1) + "\n").encode(), "record")


def _plain(job: TrainingJob) -> list[list[str]]:
    """The commands without the folder that the configs lie in."""
    return [[word.replace(CONFIGS, "configs") for word in words] for words in job.commands]


def _run(job: TrainingJob, log: str) -> Iterator[tuple[float, str]]:
    """Runs the commands of a job; yields the share that is done, and in words."""
    for words in job.commands:
        if words[0] != "src.main" and os.path.exists(out := _flag(words, "out")):
            if os.path.exists(os.path.join(out, "weights.json")):
                continue  # it was made before a stop
            raise ValueError(f"{out} is not whole: remove it, and give the same command again")
        yield from _started(words, job, log)
        if not read_metrics(os.path.join(job.workdir, METRICS))[0]:  # a run that is asked to stop ends well
            raise RuntimeError(f"the run {job.name} was stopped before its end: the same command goes on from there")


def _started(words: Sequence[str], job: TrainingJob, log: str) -> Iterator[tuple[float, str]]:
    with open(log, "ab") as kept, _terminating():
        process = subprocess.Popen(
            [sys.executable, "-m", *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
        )
        last: list[str] = []
        try:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                text = line.decode(errors="replace").strip()
                last = [*last, text][-LINES:]
                if found := STEP.search(text):
                    step, steps = map(int, found.groups())
                    yield 0.9 * step / max(steps, 1), f"step {step} of {steps}"  # the evaluation comes behind
            code = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()  # it finishes its step and saves
                process.wait()
    if code:
        raise RuntimeError(f"the run {job.name} failed (exit code {code}; {log} has all of it): {' / '.join(last)}")


@contextlib.contextmanager
def _terminating() -> Iterator[None]:
    """SIGTERM is as Ctrl-C within, so that the process that was started ends, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _flag(words: Sequence[str], name: str) -> str:
    return next(word.partition("=")[2] for word in words if word.startswith(f"--{name}="))
