"""Fault 28: two runs in one workdir. The second is refused; what a dead run left is taken over."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time

import pytest
from etils import epath

from src.train.checkpoints import lock
from src.train.checkpoints.checkpointer import Checkpointer
from tests.helpers.one_run import Process


@pytest.fixture
def quick(monkeypatch):
    """Seconds become hundredths."""
    monkeypatch.setattr(lock, "BEAT", 0.05)
    monkeypatch.setattr(lock, "LOST", 0.8)
    monkeypatch.setattr(lock, "SETTLE", 0.05)
    monkeypatch.setattr(lock, "_leave", lambda text: None)  # would end the tests too


@pytest.fixture
def path(tmp_path):
    return epath.Path(tmp_path / "lock.json")


def left(path, age=0.0, **changes):
    """A lock that somebody else left, renewed `age` seconds ago."""
    path.write_text(json.dumps(lock.me() | {"token": "x", "beat": 3, "since": "yesterday"} | changes))
    os.utime(path, (time.time() - age,) * 2)


def test_a_second_run_is_refused_until_the_first_has_ended(path, quick):
    first, second = lock.Lock(path), lock.Lock(path)
    first.take()
    with pytest.raises(RuntimeError, match=f"process {os.getpid()}, since 20.*choose another --workdir") as error:
        second.take()
    assert str(error.value).count("\n") == 0 and lock.me()["host"] in str(error.value)
    second.release()
    assert path.exists(), "a run that was refused leaves the lock alone"
    first.release()
    assert not path.exists()
    second.take()
    second.release()


def test_what_a_dead_run_of_this_machine_left_is_taken_over(path, quick, caplog):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for changes in ({"pid": gone.pid}, {"started": "1"}, {"boot": "another"}, {"pid": None}):
        left(path, **changes)
        held = lock.Lock(path)
        held.take()
        assert "yesterday is gone" in caplog.text
        caplog.clear()
        held.release()


def test_another_machine_is_believed_while_it_gives_signs_of_life(path, quick):
    """By the clock of the file system, then by watching; the clocks of the two machines do not count."""
    for age in (3600, -3600):  # its clock is an hour ahead: only watching tells
        left(path, age=age, host="elsewhere")
        held, began = lock.Lock(path), time.monotonic()
        held.take()
        assert (time.monotonic() - began < lock.LOST) == (age > 0)
        held.release()
    path.write_text("{half a li")  # killed while it wrote, on a file system that cannot do better
    held = lock.Lock(path)
    held.take()
    held.release()
    left(path, host="elsewhere")
    beats = threading.Timer(0.2, lambda: left(path, host="elsewhere", beat=4))
    beats.start()
    with pytest.raises(RuntimeError, match="host elsewhere"):
        lock.Lock(path).take()
    container = {"space": "pid:[1]", "pid": 2**22 + 1}  # of this machine, with other process numbers: none here
    left(path, **container)
    threading.Timer(0.2, lambda: left(path, beat=4, **container)).start()
    with pytest.raises(RuntimeError, match="another run is active"):
        lock.Lock(path).take()


def test_a_run_whose_lock_was_taken_ends(path, quick):
    """It was stopped for long, and another one took over: it must not write again."""
    told = []
    held = lock.Lock(path, told.append)
    held.take()
    left(path, host="elsewhere")
    end = time.monotonic() + 5
    while not told and time.monotonic() < end:
        time.sleep(0.01)
    assert "host elsewhere, process" in told[0] and "has taken over" in told[0]
    held.release()
    assert json.loads(path.read_text())["host"] == "elsewhere", "it is not removed"


def test_a_lock_in_a_store(bucket, quick, monkeypatch):
    path = epath.Path("gs://bucket/run/lock.json")
    first = lock.Lock(path)
    first.take()
    with pytest.raises(RuntimeError, match="another run is active in gs://bucket/run"):
        lock.Lock(path).take()
    first.release()
    path.write_text(json.dumps({"host": "elsewhere", "token": "x"}))
    held, began = lock.Lock(path, lambda text: None), time.monotonic()
    held.take()
    assert time.monotonic() - began > lock.LOST
    # Of two that start at once the one that wrote last has it.
    rival = lock.Lock(path)
    rival._is_dead = lambda found: True
    rival.take()
    held.release()
    assert path.exists()
    rival.release()
    assert not path.exists()
    late, sleep = lock.Lock(path), time.sleep
    other = json.dumps({"host": "elsewhere", "token": "x"})
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (path.write_text(other), sleep(seconds)))
    with pytest.raises(RuntimeError, match="host elsewhere"):
        late.take()


def test_a_lock_that_cannot_be_renewed_does_not_stop_the_run(bucket, quick, caplog):
    path, told = epath.Path("gs://bucket/run/lock.json"), []
    held = lock.Lock(path, told.append)
    held.take()
    bucket.down = True
    type(bucket).down, before = True, type(bucket).down
    time.sleep(0.4)
    bucket.down = type(bucket).down = before
    beat = json.loads(path.read_text())["beat"]
    time.sleep(0.3)
    assert json.loads(path.read_text())["beat"] > beat and not told
    assert caplog.text.count("cannot be renewed") == 1
    held.release()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_two_runs_of_one_workdir(tmp_path):
    """The second is refused while the first lives, also beside an evaluation, and goes on once the first was killed."""
    with Process(tmp_path, "--config.steps=1000000", "--config.checkpoint.every=2") as first:
        first.until("step 6/")
        with Process(tmp_path) as second:
            assert second.wait() == 1
        last = second.said().splitlines()[-1]
        assert last.startswith("error: another run is active") and f"process {first.popen.pid}" in last
        with Process(tmp_path, "--mode=eval") as reader:
            assert reader.wait() == 0, reader.said()
        assert first.popen.poll() is None
        first.signal("SIGKILL")
        first.wait()
        assert (first.workdir / "lock.json").exists()
    with Process(tmp_path, "--config.steps=1000000") as third:
        third.until("resuming from step")
        third.until("step ")
        assert "Taking over" in third.said()
        # The first one was only stopped for long, it seems: another run's name stands in the file.
        other = json.loads((first.workdir / "lock.json").read_text()) | {"token": "x", "host": "elsewhere"}
        (first.workdir / "lock.json").write_text(json.dumps(other))
        assert third.wait(60) == 1 and "has taken over" in third.said()


@pytest.mark.parametrize("way", ["removed", "moved", "replaced"])
def test_a_workdir_that_goes_under_a_run_ends_it(tmp_path, monkeypatch, way):
    """By the lock's thread, within `BEAT` seconds, and at the latest when a checkpoint is due."""
    workdir, told, ended = tmp_path / "run", [], threading.Event()
    checkpoints = Checkpointer(workdir)
    checkpoints.check_there()
    monkeypatch.setattr(lock, "BEAT", 0.05)
    held = lock.Lock(epath.Path(workdir / "lock.json"), lambda text: (told.append(text), ended.set()))
    held.take()
    time.sleep(0.2)
    assert not told
    if way == "moved":
        workdir.rename(tmp_path / "elsewhere")
    else:
        # A beat may write a file into a folder that `rmtree` has just emptied: try until none is left.
        while workdir.exists():
            shutil.rmtree(workdir, ignore_errors=True)
    if way == "replaced":
        workdir.mkdir()
    assert ended.wait(10) and f"the workdir {workdir} was removed, moved or replaced" in told[0]
    held.release()
    with pytest.raises(RuntimeError, match=f"the workdir {workdir} was removed, moved or replaced.*put it back"):
        checkpoints.save(4, {"step": 4}, {}, {})
    with pytest.raises(RuntimeError, match="was removed"):
        checkpoints.complete(lambda: None)
    checkpoints.close()
    assert not (workdir / "checkpoints").exists(), "nothing is written as if nothing had been before"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_whose_workdir_is_removed_ends_with_a_sentence(tmp_path):
    with Process(tmp_path, "--config.steps=1000000", "--config.checkpoint.every=0") as run:
        run.until("step 2/")
        shutil.rmtree(run.workdir, ignore_errors=True)
        assert run.wait(60) == 1
    assert run.said().splitlines()[-1].startswith(f"error: the workdir {run.workdir} was removed, moved or replaced")
