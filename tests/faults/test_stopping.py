"""Faults 3, 4 and 5: SIGTERM and Ctrl-C, once and twice, at one process and at one of two."""

import json
import os
import re
import signal
import time

import pytest
from test_processes import folder, logged, said, start  # noqa: F401 - fixtures

from src.common.runtime import stopping
from tests.helpers.one_run import Lines, Process, losses, small_loop


@pytest.fixture
def watch(monkeypatch):
    """Signals of this process are watched; an end of the process is an exit code in the list."""
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    before = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background ignores it
    stopping.start(graceful=True, shared=False)
    yield codes
    stopping.close()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "the signals are given back"
    signal.signal(signal.SIGINT, before)


def send(number):
    """A signal that has been heard when this returns."""
    heard = stopping._watch.heard
    os.kill(os.getpid(), number)
    while stopping._watch.heard == heard:
        time.sleep(0.001)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_step_is_finished_and_saved(watch, monkeypatch, number):
    writer = Lines(lambda step: send(number) if step == 3 else None)
    with pytest.raises(stopping.Stopped, match="at step 4"):
        small_loop(monkeypatch, writer)
    assert small_loop.saved == [4] and writer.steps == [1, 2, 3, 4] and watch == []


def test_a_stop_during_an_evaluation_loses_no_step(watch, monkeypatch):
    def slow(predict, seed):
        send(signal.SIGTERM)
        stopping.check()  # as the predictor does before every chunk
        raise AssertionError("it went on")

    with pytest.raises(stopping.Stopped, match="at step 2"):
        small_loop(monkeypatch, Lines(), evaluators={"slow": slow}, eval={"every": 2, "ema": True}, log={"every": 50})
    assert small_loop.saved == [2] and watch == []


def test_where_nothing_would_be_lost_the_process_ends(watch, monkeypatch, tmp_path):
    """Before the first step and after the last; what was registered is called first, and the launcher is told."""
    called = []
    monkeypatch.setenv(stopping.NOTE, str(tmp_path / "note"))
    stopping.before_leaving(lambda: called.append(1))
    send(signal.SIGTERM)
    assert watch == [0] and called == [1] and "nothing" in (tmp_path / "note").read_text()


def test_the_second_interrupt_ends_the_process(watch):
    stopping.busy()
    for _ in range(2):
        send(signal.SIGTERM)
    assert watch == [] and stopping.asked()
    send(signal.SIGINT)
    assert watch == []
    send(signal.SIGINT)
    assert watch == [130]


def test_several_processes_leave_at_the_step_that_they_agree_on(watch, monkeypatch):
    from jax.experimental import multihost_utils

    asks, relayed = [], []
    monkeypatch.setattr(multihost_utils, "reached_preemption_sync_point", lambda n: asks.append(n) or n == 3)
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.default_int_handler)
    stopping.start(graceful=True, shared=True)
    kill = os.kill
    monkeypatch.setattr(os, "kill", lambda pid, n: relayed.append(n) if n == signal.SIGTERM else kill(pid, n))
    send(signal.SIGINT)
    assert relayed == [signal.SIGTERM], "to JAX's service, which tells the others"
    assert [stopping.asked() for _ in range(4)] == [False, False, True, True] and asks == [1, 2, 3]


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
def test_a_run_that_was_stopped_goes_on_exactly(tmp_path, number):
    endless = "--config.steps=1000000"
    schedule = ["--config.optim.steps=100", "--config.log.every=1", "--config.checkpoint.every=0"]
    note = tmp_path / "note"
    with Process(tmp_path, endless, *schedule, STOP_NOTE=str(note)) as run:
        run.until("step 3/")
        run.signal(number)
        assert run.wait(60) == 0, run.said()
    step = int(re.search(r"stopped as asked at step (\d+)", run.said())[1])
    assert note.read_text() == f"at step {step}\n"
    assert [p.name for p in (run.workdir / "checkpoints").iterdir()] == [str(step)]
    assert not (run.workdir / "metrics.json").exists() and not (run.workdir / "lock.json").exists()
    end = step + 3
    with Process(tmp_path, f"--config.steps={end}", *schedule) as again:
        assert again.wait() == 0, again.said()
    assert f"resuming from step {step}" in again.said()
    os.rename(run.workdir, tmp_path / "stopped")
    with Process(tmp_path, f"--config.steps={end}", *schedule) as straight:
        assert straight.wait() == 0, straight.said()
    assert losses(tmp_path / "stopped") == losses(run.workdir)
    metas = [
        json.loads((w / "checkpoints" / str(end) / "meta" / "metadata").read_text())["leaves"]
        for w in (tmp_path / "stopped", run.workdir)
    ]
    assert metas[0] == metas[1], "bit for bit"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_interrupts_while_it_compiles_and_twice_while_it_trains(tmp_path):
    slow = "import jax\ncompile = jax.stages.Lowered.compile\nimport time\n"
    slow += "jax.stages.Lowered.compile = lambda self: (print('compiling', flush=True), time.sleep(100))\n"
    with Process(tmp_path, before=slow) as run:
        run.until("compiling")
        run.signal("SIGINT")
        assert run.wait(10) == 0 and "the same command goes on" in run.said(), run.said()
    assert not (run.workdir / "lock.json").exists()
    with Process(tmp_path, "--config.steps=1000000", "--config.log.every=1000000") as run:
        run.until("step 1/")
        run.popen.send_signal(signal.SIGSTOP)
        for name in ("SIGINT", "SIGTERM"):
            run.signal(name)
        run.signal("SIGCONT")
        assert run.wait(60) == 0
    hang = "from src.train import loop\nimport time\nloop.Run.save = lambda self: time.sleep(100)\n"
    with Process(tmp_path, "--config.steps=1000000", "--config.checkpoint.every=0", before=hang) as run:
        run.until("/1000000")
        run.signal("SIGINT")
        run.until("asked to stop")
        run.signal("SIGINT")
        assert run.wait(10) == 130 and "ended by SIGINT" in run.said()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_two_processes_stop_at_one_step(folder, start):  # noqa: F811
    steps = []
    for who, name in ((1, signal.SIGTERM), (0, signal.SIGTERM), (1, signal.SIGINT)):
        pair = start("--config.steps=1000000")
        before = len(logged(folder)) if (folder / "run" / "log.jsonl").exists() else 0
        end = time.monotonic() + 240
        while not (folder / "run" / "log.jsonl").exists() or len(logged(folder)) < before + 3:
            assert time.monotonic() < end and not any(p.poll() for p in pair), said(folder, 0) + said(folder, 1)
            time.sleep(0.05)
        pair[who].send_signal(name)
        began = time.monotonic()
        assert [p.wait(300) for p in pair] == [0, 0], said(folder, 0) + said(folder, 1)
        print(f"{name.name} at process {who}: both ended after {time.monotonic() - began:.1f} s")
        left = [int(re.search(r"stopped as asked at step (\d+)", said(folder, i))[1]) for i in range(2)]
        assert left[0] == left[1] and (folder / "run" / "checkpoints" / str(left[0])).is_dir()
        assert not (folder / "run" / "metrics.json").exists()
        if steps:
            assert f"resuming from step {steps[-1]}" in said(folder, 0)
        steps.append(left[0])
