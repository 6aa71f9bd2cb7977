"""Faults 6, 7, 17 and 25: a loader, device, disk or other process that does not answer. The run ends and says where."""

import os
import signal
import sys
import threading
import time

import pytest
from test_processes import folder, logged, said, start  # noqa: F401 - fixtures

from src.common.runtime import watchdog
from tests.helpers.one_run import Endless, Lines, Process, small_loop


class Ended(Exception):
    """Instead of the end of the process, which hangs no longer then."""


@pytest.fixture
def ended(monkeypatch):
    """An event that is set where the process would end, with the exit code."""
    event = threading.Event()
    monkeypatch.setattr(os, "_exit", lambda code: (setattr(event, "code", code), event.set()))
    return event


def hang(ended):
    """Until the process would have ended."""
    assert ended.wait(20), "nobody noticed"
    raise Ended


ALLOWED = {"seconds": 0.3, "start": 20, "save": 0.4, "evaluate": 0.3}


def stalled_data(monkeypatch, ended):
    class Stalled(Endless):
        def __next__(self):
            if self.count == 3:
                hang(ended)
            self.count += 1
            return {}

        count = 0

    small_loop(monkeypatch, Lines(), data=Stalled())


def stalled_device(monkeypatch, ended):
    small_loop(monkeypatch, Lines(lambda step: hang(ended) if step == 3 else None))


def stalled_compiler(monkeypatch, ended):
    small_loop(monkeypatch, Lines(), update=lambda state, batch: hang(ended))


def stalled_save(monkeypatch, ended):
    from tests.helpers.one_run import Checkpoints

    monkeypatch.setattr(Checkpoints, "save", lambda *_: hang(ended))
    small_loop(monkeypatch, Lines())


def stalled_evaluator(monkeypatch, ended):
    evaluators = {"slow": lambda predict, seed: hang(ended)}
    small_loop(monkeypatch, Lines(), evaluators=evaluators, eval={"every": 2, "ema": True})


@pytest.mark.parametrize(
    "stall, place, allowed, told",
    [
        (stalled_data, "waiting for data", 0.3, "the input stalled"),
        (stalled_device, "in the train step", 0.3, "the device does not answer"),
        (stalled_compiler, "starting", 0.4, "compiling, reading the checkpoint or the first step takes longer"),
        (stalled_save, "saving", 0.4, "the checkpoint is not written"),
        (stalled_evaluator, "evaluating", 0.3, "an evaluator takes longer"),
    ],
)
def test_what_hangs_is_named_and_ended(ended, monkeypatch, capfd, caplog, stall, place, allowed, told):
    monkeypatch.setattr(sys, "__stderr__", sys.stderr)
    caplog.set_level("WARNING")
    allowances = ALLOWED | ({"start": allowed} if place == "starting" else {})
    began = time.monotonic()
    with pytest.raises(Ended), watchdog.watching(**allowances):
        stall(monkeypatch, ended)
    assert time.monotonic() - began >= allowed and ended.code == 1
    said = [r.getMessage() for r in caplog.records if "does not move" in r.getMessage()]
    said = [text for text in said if f"s, {place}" in text]  # a busy machine may be slow elsewhere, too, …
    first, *_, last = said  # … or in an earlier step
    assert f"s, {place}; at {allowed:.0f} s it is ended" in first, "warned at half the time"
    assert f"s, {place}: {told}" in last and "goes on from the last checkpoint" in last
    stacks = capfd.readouterr().err
    assert stacks.count("in hang") >= 2 and 'test_hangs.py"' in stacks, "where it hangs is to be seen, twice"


def test_a_run_that_moves_is_left_alone(ended, monkeypatch, caplog):
    """Longer than any allowance, in all; and 0 is no limit."""
    slow = {"seconds": 0.6, "start": 20, "save": 0.6, "evaluate": 0}
    evaluators = {"slow": lambda predict, seed: time.sleep(0.8) or sys.exit("done")}
    with pytest.raises(SystemExit), watchdog.watching(**slow):
        small_loop(monkeypatch, Lines(lambda step: time.sleep(0.05)), steps=20, evaluators=evaluators,
                   eval={"every": 16, "ema": True})  # fmt: skip
    assert not ended.is_set() and "does not move" not in caplog.text
    before = threading.active_count()
    with watchdog.watching(0, 0, 0, 0):
        assert threading.active_count() == before
        with watchdog.during(watchdog.SAVE):
            assert watchdog._watchdog.place == watchdog.SAVE
        assert watchdog._watchdog.place == watchdog.START, "back where it was"
    watchdog.at(watchdog.DATA)  # nobody watches


STALL = """
import time
from src.data.pipeline import reader
load = reader.Reader.__call__
def stalled(self, index, rng):
    stalled.count += 1
    if stalled.count > 800:
        time.sleep(1e6)
    return load(self, index, rng)
stalled.count = 0
reader.Reader.__call__ = stalled
"""
NO_FOLDER = """
import os, pathlib
from src.train import loop
save = loop.Run.save
def broken(self):
    if self.step == 4:
        self.checkpoints.finish()
        os.rename(self.checkpoints.directory, str(self.checkpoints.directory) + ".gone")
        pathlib.Path(self.checkpoints.directory).write_text("a file")
    save(self)
loop.Run.save = broken
"""
PATIENT = "import os\nos.environ['JAX_HEARTBEAT_TIMEOUT'] = '600'\n"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_loader_that_stalls_ends_the_run(tmp_path):
    """Grain's thread sleeps for ever: the main thread's and the loader's stacks are in the log."""
    with Process(tmp_path, "--config.steps=1000000", "--config.watchdog.seconds=4", before=STALL) as run:
        began = time.monotonic()
        assert run.wait(120) == 1
    assert "waiting for data: the input stalled" in run.said() and time.monotonic() - began < 120
    assert "in stalled" in run.said() and "in advance" in run.said()
    assert not (run.workdir / "metrics.json").exists()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_folder_that_cannot_be_written_ends_the_run(tmp_path):
    """Orbax's threads must not keep the process."""
    with Process(tmp_path, "--config.steps=8", "--config.checkpoint.every=2", before=NO_FOLDER) as run:
        assert run.wait(120) == 1
    assert "error: the last checkpoint was not written" in run.said().splitlines()[-1]


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("way", ["killed", "heartbeat", "watchdog"])
def test_a_process_that_is_gone_or_hangs_ends_the_other(folder, start, way):  # noqa: F811
    flags, before = ["--config.steps=1000000"], ("", "")
    if way == "watchdog":
        flags, before = [*flags, "--config.watchdog.seconds=6"], (PATIENT, PATIENT)
    pair = start(*flags, before=before)
    end = time.monotonic() + 240
    while not (folder / "run" / "log.jsonl").exists() or len(logged(folder)) < 3:
        assert time.monotonic() < end and not any(p.poll() for p in pair), said(folder, 0) + said(folder, 1)
        time.sleep(0.05)
    pair[1].send_signal(signal.SIGKILL if way == "killed" else signal.SIGSTOP)
    began = time.monotonic()
    assert pair[0].wait(60) != 0
    print(f"{way}: the other ended with {pair[0].returncode} after {time.monotonic() - began:.1f} s")
    if way != "watchdog":
        last = [line for line in said(folder, 0).splitlines() if line.startswith("error: ")][-1]
        assert last.startswith("error: process 1 of 2 ended or does not answer"), said(folder, 0)
        assert "start all processes again with the same command" in last
    if way == "watchdog":
        assert pair[0].returncode == 1 and "process 0 of 2 does not move" in said(folder, 0)
        assert "in the train step: " in said(folder, 0) and "another process does not come" in said(folder, 0)


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_without_process_0_the_other_says_so_when_it_has_ended(folder, start):  # noqa: F811
    pair = start("--config.steps=1000000")
    end = time.monotonic() + 240
    while not (folder / "run" / "log.jsonl").exists() or len(logged(folder)) < 3:
        assert time.monotonic() < end and not any(p.poll() for p in pair), said(folder, 0) + said(folder, 1)
        time.sleep(0.05)
    pair[0].send_signal(signal.SIGKILL)
    assert pair[1].wait(120) != 0
    end = time.monotonic() + 30
    while not (told := [line for line in said(folder, 1).splitlines() if line.startswith("error: process 0 of 2")]):
        assert time.monotonic() < end, said(folder, 1)
        time.sleep(0.1)
    assert len(told) == 1 and "same command, which goes on from the last checkpoint" in told[0], told
