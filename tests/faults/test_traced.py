"""A running job is traced on a signal, killed, and goes on: the time of both processes is accounted for."""

import gzip
import json
import re
import time

import pytest

from src.train.goodput import read_attempts
from tests.helpers.one_run import Process, losses

SCHEDULE = ("--config.steps=1000000", "--config.optim.steps=100", "--config.log.every=1", "--config.checkpoint.every=8")


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_signal_traces_a_running_job_and_a_kill_loses_what_was_not_saved(tmp_path):
    began = time.monotonic()
    with Process(tmp_path, *SCHEDULE) as run:
        run.until("step 3/")
        run.signal("SIGUSR1")
        run.until("the trace of steps")
        reached = int(re.findall(r"step (\d+)/", run.said())[-1])
        run.until(f"step {reached + 12}/")
        run.signal("SIGKILL")
        run.wait()
        walls = [time.monotonic() - began]
    first, last = map(int, re.search(r"the trace of steps (\d+) to (\d+) is in", run.said()).groups())
    assert last == first + 4
    (path,) = (run.workdir / "profile" / str(first)).rglob("perfetto_trace.json.gz")
    with gzip.open(path) as file:
        scopes = {event.get("args", {}).get("scope", "") for event in json.load(file)["traceEvents"]}
    assert any("block/attention" in scope for scope in scopes) and any("optimizer" in scope for scope in scopes)
    seen = losses(run.workdir)
    began = time.monotonic()
    with Process(tmp_path, *SCHEDULE) as again:
        again.until("resuming from step")
        begun = int(re.search(r"resuming from step (\d+)", again.said())[1])
        again.until(f"step {begun + 20}/")
        again.signal("SIGTERM")
        assert again.wait(120) == 0, again.said()
        walls.append(time.monotonic() - began)
    now = losses(run.workdir)
    common = [step for step in seen if step in now]
    assert max(seen) > begun and [seen[step] for step in common] == [now[step] for step in common], "traced or not"
    one, two = read_attempts(run.workdir / "goodput.jsonl")
    assert two.last.total == pytest.approx(walls[1], rel=0.05, abs=1.5), "but for Python's own start and end"
    assert one.last.total <= walls[0] and walls[0] - one.last.total < 12, "up to the last record of a killed process"
    assert one.lost_steps == max(one.last.step - begun, 0) and two.last.begun == begun
