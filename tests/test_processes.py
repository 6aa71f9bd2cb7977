"""Two real processes of four devices each do what one process does, and what one device does."""

import importlib.util
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.trainer import make_trainer, open_data

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from configs import digits

def get_config():
    config = digits.get_config("debug").unlock()
    del config.tasks["number_sentences"]
    config.batch, config.steps, config.optim.steps = 56, 2, 8
    config.log.every, config.checkpoint.every = 1, 0
    config.sharding.min_size = 1024
    config.sample.rows, config.sample.longest = 4, 2
    config.doctor.update({"checks": False, "every": 0, "batches": 0, "drawings": 0})  # it compiles a lot
    config.eval.evaluators = {"digits": {"name": "digits", "draw": None, "complete": None, "captions": 4}}
    return config.lock()
"""
MAIN = """
import runpy
runpy.run_module("src.main", run_name="__main__", alter_sys=True)
"""
# Devices as a torus orders them: neither process holds consecutive rows.
TORUS = """
from src.common.mesh import sharding
arrange = sharding._arrange
sharding._arrange = lambda sizes, devices: arrange(sizes, [devices[i] for i in (4, 5, 0, 1, 2, 3, 6, 7)])
"""
# A process that cannot read step 4.
BLIND = """
import orbax.checkpoint as ocp
read = ocp.PyTreeCheckpointHandler.restore
def restore(self, directory, *arguments, **options):
    if directory.parent.name == "4":
        raise OSError("a broken disk")
    return read(self, directory, *arguments, **options)
ocp.PyTreeCheckpointHandler.restore = restore
"""


@pytest.fixture
def folder(tmp_path):
    """Where everything is."""
    (tmp_path / "config.py").write_text(CONFIG)
    return tmp_path


@pytest.fixture
def start(folder):
    """Starts two processes with one workdir, as a launcher does; their output goes to files beside it."""
    started = []

    def two(*arguments, before=("", "")):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        env = os.environ | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "XDG_CACHE_HOME": str(folder / "cache"),  # new: both make the tokenizer
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
            "JAX_NUM_PROCESSES": "2",
            "JAX_HEARTBEAT_TIMEOUT": "8",
        }
        flags = [f"--config={folder}/config.py", f"--workdir={folder}/run", *arguments]
        for index in range(2):
            command, who = [sys.executable, "-c", before[index] + MAIN, *flags], {"JAX_PROCESS_ID": str(index)}
            with open(folder / f"out.{index}", "w") as out:
                started.append(subprocess.Popen(command, cwd=ROOT, env=env | who, stdout=out, stderr=subprocess.STDOUT))
        return started[-2:]

    yield two
    for process in started:
        process.kill()
        process.wait()


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


def alone(folder):
    """Losses of five steps on one device, and the state after four."""
    trainer = make_trainer(system(folder, mesh={"data": 1, "fsdp": 1}), jax.devices()[:1])
    state, update, data, losses = trainer.init(), trainer.compile(), open_data(trainer), []
    for step in range(1, 6):
        state, measured = update(state, put_batch(next(data), trainer.mesh))
        losses.append((step, float(measured.terms["total"].total)))
        if step == 4:
            kept = jax.device_get(state)
    data.close()
    return losses, kept


def test_processes_share_one_run(folder, start):
    """Steps 1 and 2 in two processes, 3 and 4 in this one, 4 and 5 in two processes again, one of which then dies."""
    pair = start("--config.mesh.data=4", "--config.mesh.fsdp=2", before=(TORUS, TORUS))
    losses, state = alone(folder)
    assert [process.wait(240) for process in pair] == [0, 0], said(folder, 0) + said(folder, 1)
    np.testing.assert_allclose(logged(folder), losses[:2], rtol=2e-4)
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 2
    assert "step 2/2" in said(folder, 0) and "caption_accuracy" in said(folder, 0)
    told = re.findall(r"^[IWEF]\d{4} .*", said(folder, 1), re.MULTILINE)
    assert len(told) == 1 and "waits up to 300 s for the others" in told[0] and "caption_acc" not in said(folder, 1)
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1

    trainer = make_trainer(system(folder, mesh={"data": 2, "fsdp": 4}, steps=4))
    checkpoints, writer = Checkpointer(folder / "run", keep=4, every=1), Losses()
    reached, _ = loop.train(trainer, checkpoints, writer, time.monotonic())
    checkpoints.close()
    np.testing.assert_allclose(writer.seen, losses[2:4], rtol=2e-4)
    assert int(reached.step) == 4
    for ours, theirs in zip(jax.tree.leaves(reached.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-4, atol=2e-6)

    # The axis `tensor` spans both processes: they read the same rows.
    pair = start("--config.mesh.data=1", "--config.mesh.tensor=8", "--config.steps=1000000", before=("", BLIND))
    waited = time.monotonic()
    while len(logged(folder)) < 4 and time.monotonic() - waited < 240 and not any(p.poll() for p in pair):
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGKILL)
    assert pair[0].wait(60) != 0, "it noticed"
    np.testing.assert_allclose(logged(folder)[2:4], losses[3:5], rtol=2e-4)
    assert [p.name for p in (folder / "run" / "damaged").iterdir()] == ["4-0"]
    for index in range(2):
        assert "state: on process 1: OSError: a broken disk" in said(folder, index)
