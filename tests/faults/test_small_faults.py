"""Faults 27, 29 and 30: metrics that cannot be written, clocks that jump, memory that does not suffice."""

import errno
import itertools
import json
import os
import pathlib
import re
import shutil
import time
import types

import jax
import pytest

from src import main
from src.common.runtime import errors, writers
from src.common.runtime.writers import JsonLinesWriter, Many, TensorBoard
from tests.helpers.one_run import Lines, Process, losses, small_loop


def steps(path):
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def test_a_run_goes_on_while_metrics_cannot_be_written(tmp_path, monkeypatch, caplog):
    """The folders are removed, replaced by files, the disk is full, and all comes back."""
    board, log = TensorBoard(tmp_path / "tb" / "events"), JsonLinesWriter(tmp_path / "log" / "log.jsonl")

    def fault(step):
        if step == 2:  # rm -r
            shutil.rmtree(tmp_path / "tb")
            shutil.rmtree(tmp_path / "log")
        elif step == 4:  # files where the folders were
            for name in ("tb", "log"):
                shutil.rmtree(tmp_path / name)
                (tmp_path / name).write_text("")
        elif step == 7:
            for name in ("tb", "log"):
                (tmp_path / name).unlink()

    class Both(Many):
        def write_scalars(self, step, scalars):
            fault(step)
            super().write_scalars(step, scalars)
            self.flush()

    caplog.set_level("INFO")
    small_loop(monkeypatch, Both([board, log]), steps=8)
    assert small_loop.saved == [8], "training went on"
    assert (board.lost, log.lost) == (3, 3)  # steps 4, 5 and 6
    assert steps(tmp_path / "log" / "log.jsonl") == [7, 8]
    (events,) = (tmp_path / "tb" / "events").iterdir()
    assert events.read_bytes().count(b"learning_rate") == 2
    warnings = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert sum("training goes on and this is said once" in text for text in warnings) == 2
    log.close()
    assert "JsonLinesWriter lost 3 writes" in caplog.text


def test_a_full_disk_costs_the_lines_of_that_time_only(tmp_path, monkeypatch):
    """ENOSPC in the middle of a line: it is not left half written, and a slow failure is not repeated at every line."""
    log = JsonLinesWriter(tmp_path / "log.jsonl")
    write = lambda step: log.write_scalars(step, {"loss": 0.5})
    write(1)

    class Full:
        name = log._handle.name

        def __init__(self, file):
            self.file = file

        def write(self, data):
            self.file.write(data[:9])
            self.file.flush()
            now[0] += slow
            raise OSError(errno.ENOSPC, "No space left on device")

        def flush(self):
            self.file.flush()

        def close(self):
            self.file.close()

    now, slow = [1000.0], 0.0
    monkeypatch.setattr(writers, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    log._handle = Full(log._handle)
    write(2)
    write(3)
    slow = 2 * writers.SLOW
    log._handle = Full(log._handle)
    for step in (4, 5, 6):  # 5 and 6 are not tried: 2 s are 5 % of 40 s
        write(step)
        now[0] += 10
    now[0] += 20
    write(7)
    log.close()
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines if line.endswith("}")] == [1, 3, 7] and len(lines) == 5


def test_no_duration_follows_the_clock(tmp_path, monkeypatch):
    """The clock jumps by days, forth and back, at every reading: rates, timers and the lines stay as they are."""
    real, jumps = time.time, [0]

    def jumping():
        jumps[0] += 1
        return real() + 86400 * jumps[0] * (-1) ** jumps[0]  # no two readings are alike

    from src.common.runtime import watchdog

    ends = []
    monkeypatch.setattr(os, "_exit", ends.append)
    monkeypatch.setattr(time, "time", jumping)
    log = JsonLinesWriter(tmp_path / "log.jsonl")
    with watchdog.watching(seconds=5, start=60, save=5, evaluate=5):
        small_loop(monkeypatch, log, steps=6)
    monkeypatch.setattr(time, "time", real)
    assert not ends and small_loop.saved == [6]
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and jumps[0] >= 6
    assert max(abs(a["time"] - b["time"]) for a, b in itertools.pairwise(lines)) > 86400, "the label only"


def test_nothing_but_labels_reads_the_clock():
    """`time.time` and its kin may name a moment in a file; what is measured or waited for is monotonic."""
    sources = pathlib.Path(main.__file__).parent.rglob("*.py")
    found = [path.name for path in sources if re.search(r"\btime\.time(_ns)?\(|datetime\.now|utcnow", path.read_text())]
    assert sorted(found) == ["clock.py", "goodput.py", "mlflow.py", "writers.py"]


REAL = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used 17.20G of 15.75G"
    " hbm. Exceeded hbm capacity by 1.45G.\n\nTotal hbm usage >= 17.72G:\n" + "    reserved 530.00M\n" * 400
)


@pytest.mark.parametrize("where", ["compiles", "update"])
def test_too_little_memory_is_one_sentence_with_advice(monkeypatch, where):
    def fail(*_):
        raise jax.errors.JaxRuntimeError(REAL)

    with pytest.raises(jax.errors.JaxRuntimeError) as caught:
        small_loop(monkeypatch, Lines(), **{where: fail})
    said = errors.in_words(caught.value)
    assert said.count("\n") == 0 and len(said) < 400 and "not enough memory (Used 17.20G of 15.75G)" in said
    for way in ("batch", "accumulate", "remat", "moments", "fsdp", "src.tools.aot"):
        assert way in said
    gpu = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes.")
    assert "(allocate 8589934592 bytes)" in errors.in_words(gpu)
    disk = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: error writing: No space left on device")
    assert "memory" not in errors.in_words(disk) and "No space left" in errors.in_words(disk)
    ours = "the last checkpoint was not written: the disk is full (RESOURCE_EXHAUSTED: Error writing…)"
    assert errors.in_words(OSError(ours)) == ours
    long = errors.in_words(jax.errors.JaxRuntimeError("INTERNAL: x\n" * 1000))
    assert len(long) < 500 and "--traceback" in long
    assert errors.in_words(ValueError("a\nb" * 300)) == "a\nb" * 300 and errors.in_words(KeyError("k")) == "k"


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_step_without_memory_ends_the_run_in_one_sentence(tmp_path):
    break_ = "import jax\nfrom src.train import trainer\n"
    break_ += (
        "def fail(self): raise jax.errors.JaxRuntimeError('RESOURCE_EXHAUSTED: Out of memory allocating 99 bytes.')\n"
    )
    break_ += "trainer.Trainer.compile = fail\n"
    with Process(tmp_path, before=break_) as run:
        assert run.wait(120) == 1
    assert run.said().splitlines()[-1].startswith("error: the device has not enough memory (allocating 99 bytes): try")


JUMPS = """
import threading, time
from src.train import loop
real, days = time.time, [0]
time.time = lambda: real() + 86400 * days[0]
advance, save = loop.Run.advance, loop.Run.save
def jumping(self):
    days[0] = {3: 1, 6: -1}.get(self.step, days[0])
    advance(self)
def saving(self):
    if self.step == 8:  # Orbax's own limits read the clock: this save may fail, and the next is tried
        threading.Timer(0.02, lambda: days.append(days.pop() + 2)).start()
    save(self)
loop.Run.advance, loop.Run.save = jumping, saving
"""


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_run_whose_folders_vanish_and_whose_clock_jumps_ends_the_same(tmp_path):
    flags = ["--config.steps=12", "--config.log.every=1", "--config.checkpoint.every=8"]
    with Process(tmp_path, *flags) as straight:
        assert straight.wait() == 0, straight.said()
    os.rename(straight.workdir, tmp_path / "straight")
    with Process(tmp_path, *flags, before=JUMPS) as run:
        run.until("step 3/")
        shutil.rmtree(run.workdir / "tensorboard")
        (run.workdir / "tensorboard").write_text("a file")
        assert run.wait() == 0, run.said()
    assert losses(run.workdir) == losses(tmp_path / "straight")
    assert run.said().count("TensorBoard cannot write") == 1
    assert json.loads((run.workdir / "metrics.json").read_text())["seconds_total"] < 600
