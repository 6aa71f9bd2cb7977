"""Devices of one CPU, as runs have them by default: nothing that they compute can wait for ever, or meet wrongly.

More starts than the test has, with a folder for compiled programs:

python -c "import pathlib; from tests.faults.test_two_devices import hammer; print(hammer(200, pathlib.Path('x')))"
"""

import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from src.tools.compile.hlo import KINDS, parse
from tests.helpers.one_run import Process

CALLED = ("body", "condition", "calls", "to_apply", "true_computation", "false_computation", "branch_computations")
STEPS, LIMIT = 12, 900.0  # of a run; seconds of a process
# Layers in a row, layers in a loop, and microbatches in another loop around it.
CASES = ({"depth": 2}, {"depth": 10}, {"depth": 3, "remat": "dots"}, {"depth": 3, "remat": "full", "accumulate": 2})
PRELOADED = ["configs.digits", "src.build", "src.train.trainer", "tests.faults.test_two_devices"]


def run(case, devices, cache, path):
    """Writes the losses of a run into a file; for a process that has not used JAX's devices yet."""
    os.environ["XDG_CACHE_HOME"], os.environ["JAX_PLATFORMS"] = str(cache), "cpu"
    os.environ.pop("XLA_FLAGS", None)
    import jax

    from configs import digits
    from src.build import build_system, rows_of
    from src.common.mesh import distributed
    from src.common.runtime import cpu_devices
    from src.common.runtime.compilation_cache import use_program_cache
    from src.train.trainer import make_trainer, open_data

    config = digits.get_config("debug")
    with config.unlocked():
        for name in [name for name in config.tasks if name != "caption_to_image"]:
            del config.tasks[name]
        config.eval.evaluators, config.batch = {}, 16
        config.accumulate = case.get("accumulate", 1)
        config.model.trunk.update({name: value for name, value in case.items() if name != "accumulate"})
    cpu_devices.start(config, rows_of(config), devices)
    distributed.start()
    use_program_cache()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    assert jax.device_count() == devices
    trainer = make_trainer(build_system(config))
    data, step, state = open_data(trainer), trainer.compile(), trainer.init()
    terms = []
    for number in range(STEPS):  # nothing is waited for, as in a run
        state, measured = step(state, trainer.place(next(data), number))
        terms.append(measured.terms["total"].total)
    data.close()
    path.write_text(json.dumps([float(x) for x in terms]))


def losses(case, devices, cache, rng=None):
    """Losses of a run in a fresh process, which `rng` stops and lets go on at any moment."""
    context = multiprocessing.get_context("forkserver")  # imports are there already
    context.set_forkserver_preload(PRELOADED)
    path = cache / "losses"
    path.unlink(missing_ok=True)
    process = context.Process(target=run, args=(case, devices, cache, path))
    process.start()
    end = time.monotonic() + LIMIT
    try:
        while process.is_alive() and rng is not None and time.monotonic() < end:
            process.join(rng.random() * 0.3)
            with contextlib.suppress(ProcessLookupError):  # it has come to its end
                os.kill(process.pid, signal.SIGSTOP)
                time.sleep(rng.random() * 0.1)
                os.kill(process.pid, signal.SIGCONT)
        process.join(max(end - time.monotonic(), 1))
        assert process.exitcode == 0, f"{case}: exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()
    return json.loads(path.read_text())


def hammer(starts, cache, busy=2):
    """Many starts on two devices, of each case in turn, beside `busy` processes that take the cores; the largest
    difference to one device."""
    cache.mkdir(exist_ok=True)
    alone, first = ([losses(case, devices, cache) for case in CASES] for devices in (1, 2))
    load = [subprocess.Popen(["nice", "-n", "10", sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        for number in range(starts):
            case = number % len(CASES)
            found = losses(CASES[case], 2, cache, random.Random(number))
            assert found == first[case], f"start {number}, {CASES[case]}: {found} instead of {first[case]}"
            print(number, end=" ", flush=True)
    finally:
        for each in load:
            each.kill()
            each.wait()
    return max(abs(a / b - 1) for one, two in zip(alone, first, strict=True) for a, b in zip(one, two, strict=True))


@pytest.mark.faults
@pytest.mark.timeout(1800)
def test_starts_on_two_devices_neither_hang_nor_differ(tmp_path):
    assert hammer(len(CASES), tmp_path / "cache") < 1e-5


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
    """Such a collective may meet one behind the loop (docs/pods.md). By default rows alone are split: then checks,
    steps with loops of layers and of microbatches, measurements, held-out losses, images and texts have none. With fsdp
    some do, which shows that the test would see them."""
    flags += ["--cpu_devices=2", "--config.model.trunk.depth=10", "--config.model.trunk.remat=dots"]
    flags += ["--config.accumulate=2", "--config.doctor.every=2", "--config.sharding.min_size=64"]
    flags += [f"--config.eval.evaluators.digits.{name}=20" for name in ("images", "captions", "sentences")]
    dump = tmp_path / "programs"
    dumped = f"--xla_dump_to={dump} --xla_dump_hlo_as_text"
    with Process(tmp_path, *flags, XLA_FLAGS=dumped, JAX_PLATFORMS="cpu") as process:
        assert process.wait(1200) == 0, process.said()
    texts = {path.name: path.read_text() for path in dump.glob("*after_optimizations.txt")}
    together = [name for name, text in texts.items() if any(f" {kind}(" in text for kind in KINDS)]
    assert any("jit_step" in name for name in together) and any("jit__fill" in name for name in texts)
    assert len(texts) > 15, "a start compiles some 19 programs"
    found = {name: found for name, text in texts.items() if (found := in_loops(text))}
    assert bool(found) == ("--config.mesh.fsdp=2" in flags), found
