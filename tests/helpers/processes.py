"""Two processes of four devices each that share one run, and the same system in this process."""

import importlib.util
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

from src.build import build_system

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from configs import digits

def get_config():
    config = digits.get_config("debug").unlock()
    del config.tasks["number_sentences"]
    config.batch, config.steps, config.optim.steps = 56, 2, 8
    config.log.every, config.checkpoint.every = 1, 0
    config.sharding.min_size = 1024
    config.sample.batch_size, config.decode.text.max_new_tokens = 4, 2
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
