"""A debug run in a process of its own, and a loop without a network, to be stopped, locked out and broken."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from src.common.mesh.fsdp import Placement
from src.data.pipeline.stream import Mixture
from src.interfaces import LossTerm
from src.train import loop, skip_nonfinite
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.state import TrainState
from src.train.step import StepMetrics
from src.train.trainer import Trainer
from tests.helpers.compiling import ENVIRONMENT
from tests.helpers.numbers import bare

ROOT = pathlib.Path(__file__).parents[2]
MAIN = """
import runpy
runpy.run_module("src.main", run_name="__main__", alter_sys=True)
"""

# The doctor compiles for longer than a debug run trains.
QUIET = tuple(f"--config.doctor.{name}" for name in ("checks=False", "every=0", "batches=0", "drawings=0"))


class Process:
    """`src.main` on the debug digits in `folder/run`; its output is in a file; without the doctor."""

    def __init__(self, folder, *arguments, before="", config="configs/digits.py:debug", **environment):
        self.out, self.workdir = folder / f"out.{len(list(folder.glob('out.*')))}", folder / "run"
        env = os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(folder / "cache")} | environment
        flags = [f"--config={config}", f"--workdir={self.workdir}", *QUIET, *arguments]
        # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
        command = ["env", "--default-signal=INT", sys.executable, "-c", before + MAIN, *flags]
        with open(self.out, "w") as out:
            self.popen = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.popen.kill()
        self.popen.wait()

    def said(self):
        return self.out.read_text()

    def until(self, text, seconds=240):
        """Waits until it has said so."""
        end = time.monotonic() + seconds
        while text not in self.said():
            assert self.popen.poll() is None, self.said()
            assert time.monotonic() < end, self.said()
            time.sleep(0.02)

    def signal(self, name):
        self.popen.send_signal(signal.Signals[name])

    def wait(self, seconds=240):
        return self.popen.wait(seconds)


def losses(workdir):
    """By step, the last line of each."""
    lines = [json.loads(line) for line in (workdir / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


class Checkpoints(Checkpointer):
    """Remembers what was saved."""

    directory = workdir = pathlib.Path("nowhere")

    def __init__(self):
        self.saved = []

    def due(self, step, evaluated=False):
        return False

    def latest_step(self):
        return None

    def restore(self, abstract, accept):
        return None

    def save(self, step, *rest):
        self.saved.append(step)
        return True

    def finish(self, *rest):
        """Nothing is being written."""

    wait = close = complete = score = finish


class Endless(Mixture):
    """Batches without rows."""

    def __init__(self):
        """Opens nothing."""

    def __next__(self):
        return {}

    def get_state(self):
        return {}

    def settle(self):
        """Nothing was bad."""
        return {}

    get_counts = settle

    def close(self):
        """Nothing to close."""


class Lines:
    """A writer that calls `each` with the step of every line."""

    def __init__(self, each=lambda step: None):
        self.each, self.steps = each, []

    def write_scalars(self, step, scalars):
        self.steps.append(step)
        self.each(step)

    write_images = write_texts = lambda self, step, values: None

    def flush(self):
        """Nothing is kept."""

    close = flush


def small_loop(
    monkeypatch, writer, data=None, update=None, compiles=None, evaluators=None, goodput=None, tracer=None, **config
):
    """`loop.train` with a state of one number and a step that counts; gives back what was saved, or raises."""
    settings = {"seed": 0, "steps": 6, "log": {"every": 1}, "eval": {"every": 0, "ema": True}}
    settings |= {"ema": {"decay": 0.9, "warmup": True}}
    settings |= {"guard": {"patience": 3, "restore": False, "restores": 1}}
    extra = {"guard": skip_nonfinite.new_guard()}
    state = TrainState(step=jnp.int32(0), params={"w": jnp.ones(2)}, ema={}, opt_state=(), extra=extra)
    measured = small_loop.measured = StepMetrics(
        {"total": LossTerm(jnp.ones(()), jnp.ones(()))}, {}, skip_nonfinite.new_guard()
    )
    pipeline = types.SimpleNamespace(with_params=lambda params: None)
    system = dataclasses.replace(
        bare(config=ConfigDict(settings | config)), evaluators=evaluators or {}, pipeline=pipeline
    )
    mesh = jax.make_mesh((1,), ("data",))
    trainer = Trainer(system, mesh, optax.sgd(0.1), lambda step: 0.1, state, Placement({}, jnp.float32))
    update = update or (lambda state, batch: (state, measured))
    trainer.init, trainer.place = lambda: state, lambda rows, step: rows
    trainer.compile = compiles or (lambda: update)
    monkeypatch.setattr(loop, "open_data", lambda trainer, workdir: data or Endless())
    checkpoints = Checkpoints()
    try:
        loop.train(trainer, checkpoints, writer, time.monotonic(), goodput=goodput, tracer=tracer)
    finally:
        small_loop.saved = checkpoints.saved
    return trainer
