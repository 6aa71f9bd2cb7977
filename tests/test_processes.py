"""Two real processes of four devices each do what one process does, and what one device does."""

import importlib.util
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from src.build import build_system
from src.common.distributed import put_batch
from src.train import loop
from src.train.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import digits

def get_config():
    config = digits.get_config("debug").unlock()
    del config.tasks["number_sentences"]
    config.batch, config.steps, config.optim.steps = 56, 2, 8
    config.log.every, config.checkpoint.every, config.checkpoint.keep = 1, 1, 4
    config.sharding.min_size = 1024
    config.sample.rows, config.sample.longest = 4, 2
    config.eval.evaluators = {"digits": {"name": "digits", "draw": None, "complete": None, "captions": 4}}
    return config.lock()
"""
# The second process cannot read step 4.
BLIND = """
import runpy
import orbax.checkpoint as ocp
read = ocp.PyTreeCheckpointHandler.restore
def restore(self, directory, *arguments, **options):
    if directory.parent.name == "4":
        raise OSError("a broken disk")
    return read(self, directory, *arguments, **options)
ocp.PyTreeCheckpointHandler.restore = restore
runpy.run_module("src.main", run_name="__main__", alter_sys=True)
"""


def start(folder, *arguments, second=("-m", "src.main")):
    """Two processes with one workdir, as a launcher starts them; their output goes to files beside it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [f"--config={folder}/config.py", f"--workdir={folder}/run", *arguments]
    started = []
    for index, program in enumerate((("-m", "src.main"), second)):
        env = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "XDG_CACHE_HOME": str(folder / "cache"),  # new: both make the tokenizer
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_PROCESS_ID": str(index),
            "JAX_HEARTBEAT_TIMEOUT": "10",
        }
        with open(folder / f"out.{index}", "w") as out:
            started.append(subprocess.Popen([sys.executable, *program, *command], cwd=ROOT, env=env, stdout=out,
                                            stderr=subprocess.STDOUT))  # fmt: skip
    return started


def said(folder, index):
    return (folder / f"out.{index}").read_text()


def logged(folder):
    lines = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


def system(folder, **changes):
    """The same system in this process."""
    spec = importlib.util.spec_from_file_location("config", folder / "config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    config.update(changes)
    return build_system(config)


class Losses:
    """A writer that keeps the losses."""

    def __init__(self):
        self.seen = []

    def write_scalars(self, step, scalars):
        self.seen.append((step, scalars["loss"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    (folder / "config.py").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def alone(folder):
    """Losses of five steps on one device, and the state after four."""
    trainer = loop.make_trainer(system(folder, mesh={"data": 1, "fsdp": 1}), jax.devices()[:1])
    state, update, data, losses = trainer.init(), trainer.compile(), loop.open_data(trainer), []
    for step in range(1, 6):
        state, measured = update(state, put_batch(next(data), trainer.mesh))
        losses.append((step, float(measured["total"].total)))
        if step == 4:
            kept = jax.device_get(state)
    data.close()
    return losses, kept


def test_processes_share_one_run(folder, alone):
    """Steps 1 and 2 in two processes, 3 and 4 in this one, 4 and 5 in two processes again, one of which then dies."""
    losses, state = alone
    pair = start(folder, "--config.mesh.data=4", "--config.mesh.fsdp=2")
    assert [process.wait(240) for process in pair] == [0, 0], said(folder, 0) + said(folder, 1)
    np.testing.assert_allclose(logged(folder), losses[:2], rtol=2e-4)
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 2
    assert "step 2/2" in said(folder, 0) and "caption_accuracy" in said(folder, 0)
    told = [line for line in said(folder, 1).splitlines() if "[Gloo]" not in line]
    assert len(told) == 1 and "waits up to 300 s for the others" in told[0]
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1

    trainer = loop.make_trainer(system(folder, mesh={"data": 2, "fsdp": 4}, steps=4))
    checkpoints, writer = Checkpointer(folder / "run", keep=4, every=1), Losses()
    reached, _ = loop.train(trainer, checkpoints, writer, time.monotonic())
    checkpoints.close()
    np.testing.assert_allclose(writer.seen, losses[2:4], rtol=2e-4)
    assert int(reached.step) == 4
    for ours, theirs in zip(jax.tree.leaves(reached.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-4, atol=2e-6)

    # The axis `tensor` spans both processes: they read the same rows.
    pair = start(
        folder, "--config.mesh.data=1", "--config.mesh.tensor=8", "--config.steps=1000000", second=("-c", BLIND)
    )
    waited = time.monotonic()
    while len(logged(folder)) < 4 and time.monotonic() - waited < 240 and not any(p.poll() for p in pair):
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGKILL)
    assert pair[0].wait(60) != 0, "it noticed"
    np.testing.assert_allclose(logged(folder)[2:4], losses[3:5], rtol=2e-4)
    assert [p.name for p in (folder / "run" / "damaged").iterdir()] == ["4-0"]
    for index in range(2):
        assert "state: on process 1: OSError: a broken disk" in said(folder, index)
