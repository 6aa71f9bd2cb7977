"""Devices of one CPU, as runs have them by default: nothing that they compute can wait for ever, or meet wrongly.

python -m tests.faults.test_two_devices 200     # so many starts, which are otherwise few
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from src.tools.compile.hlo import KINDS, parse
from tests.helpers.one_run import Process

ROOT = pathlib.Path(__file__).parents[2]
CALLED = ("body", "condition", "calls", "to_apply", "true_computation", "false_computation", "branch_computations")
STEPS, LIMIT = 12, 900.0  # of a run; seconds of a process
# Layers in a row, layers in a loop, and microbatches in another loop around it.
CASES = ({"depth": 2}, {"depth": 10}, {"depth": 3, "remat": "dots"}, {"depth": 3, "remat": "full", "accumulate": 2})
RUNS = """
import json, sys
import jax
from configs import digits
from src.build import build_system, rows_of
from src.common.mesh import distributed
from src.common.runtime import cpu_devices
from src.common.runtime.compilation_cache import use_program_cache

devices, steps, cases = int(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
config = digits.get_config("debug")
cpu_devices.start(config, rows_of(config), devices)
distributed.start()
use_program_cache()
from src.train.trainer import make_trainer, open_data

assert jax.device_count() == devices
for case in cases:
    with config.unlocked():
        for name in [name for name in config.tasks if name != "caption_to_image"]:
            del config.tasks[name]
        config.eval.evaluators, config.batch = {}, 16
        config.accumulate = case.pop("accumulate", 1)
        config.model.trunk.update({"remat": "none"} | case)
    trainer = make_trainer(build_system(config))
    data, step, state = open_data(trainer), trainer.compile(), trainer.init()
    terms = []
    for number in range(steps):  # nothing is waited for, as in a run
        state, measured = step(state, trainer.place(next(data), number))
        terms.append(measured.terms["total"].total)
    data.close()
    print(json.dumps([float(x) for x in terms]), flush=True)
"""


def losses(cache, devices, rng=None, cases=CASES):
    """Losses of a run of each case in a fresh process, which `rng` stops and lets go on at any moment."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    env |= {"XDG_CACHE_HOME": str(cache), "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", RUNS, str(devices), str(STEPS), json.dumps(cases)]
    process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + LIMIT
    try:
        while process.poll() is None and rng is not None and time.monotonic() < end:
            time.sleep(rng.random() * 0.3)
            process.send_signal(signal.SIGSTOP)
            time.sleep(rng.random() * 0.1)
            process.send_signal(signal.SIGCONT)
        out, err = process.communicate(timeout=max(end - time.monotonic(), 1))
    finally:
        process.kill()
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines()]


def hammer(starts, cache, busy=2):
    """Many starts on two devices beside `busy` processes that take the cores; the largest difference to one device."""
    alone, first = losses(cache, 1), losses(cache, 2)
    load = [subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for number in range(starts):
            assert losses(cache, 2, random.Random(number)) == first, f"start {number} has other losses"
    finally:
        for each in load:
            each.kill()
    return max(abs(a / b - 1) for one, two in zip(alone, first, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_starts_on_two_devices_neither_hang_nor_differ(tmp_path):
    assert hammer(3, tmp_path / "cache") < 1e-5


def in_loops(text):
    """Names of the collectives of a program that stand in a loop."""
    computations = parse(text)
    waiting = [name for c in computations.values() for i in c.instructions.values() if i.opcode == "while"
               for name in i.called("body", "condition")]  # fmt: skip
    seen, found = set(), []
    while waiting:
        name = waiting.pop()
        if name in seen or name not in computations:
            continue
        seen.add(name)
        for instruction in computations[name].instructions.values():
            waiting += instruction.called(*CALLED)
            found += [instruction.name] * (instruction.opcode.removesuffix("-start") in KINDS)
    return found


@pytest.mark.faults
@pytest.mark.parametrize("flags", [["--config.mesh.data=2"], ["--config.mesh.data=1", "--config.mesh.fsdp=2"]])
def test_no_program_of_a_run_has_a_collective_in_a_loop(tmp_path, flags):
    """Such a collective may meet one behind the loop (docs/pods.md). Rows alone are split by default: checks, steps with
    loops of layers and of microbatches, measurements, held-out losses, images and texts have none. With fsdp they have,
    which shows that the test would see them."""
    flags += ["--cpu_devices=2", "--config.model.trunk.depth=10", "--config.model.trunk.remat=dots"]
    flags += ["--config.accumulate=2", "--config.doctor.every=2", "--config.sharding.min_size=64"]
    flags += [f"--config.eval.evaluators.digits.{name}=20" for name in ("images", "captions", "sentences")]
    dump = tmp_path / "programs"
    dumped = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    with Process(tmp_path, *flags, XLA_FLAGS=dumped, JAX_PLATFORMS="cpu") as process:
        assert process.wait(1200) == 0, process.said()
    texts = {path.name: path.read_text() for path in dump.glob("*after_optimizations.txt")}
    together = [name for name, text in texts.items() if any(f" {kind}(" in text for kind in KINDS)]
    assert any("jit_step" in name for name in together) and len(texts) > 20
    found = {name: found for name, text in texts.items() if (found := in_loops(text))}
    assert bool(found) == ("--config.mesh.fsdp=2" in flags), found


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        count, began = int(sys.argv[1]), time.monotonic()
        worst = hammer(count, pathlib.Path(folder))
        print(f"{count} starts of {len(CASES)} runs in {time.monotonic() - began:.0f} s; to one device {worst:.1e}")
