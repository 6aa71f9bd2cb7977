"""A run that is killed again and again ends as the run that nobody touched, bit for bit."""

import collections
import json
import os
import pathlib
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from src.train.metrics import CLOCK
from tests.helpers.events import events_of

ROOT = pathlib.Path(__file__).parents[2]
FLAGS = ("--config=configs/digits.py:debug", "--config.eval.every=3", "--config.checkpoint.every=3")
FLAGS += ("--config.doctor.checks=False",)  # they compile for longer than the run takes, and leave nothing
FLAGS += tuple(f"--config.eval.evaluators.digits.{name}=4" for name in ("captions", "sentences"))
# Where to kill the process that is started first, second, …: at a mark of slowed.py, or after any number of them.
PLANS = (
    ("init", "step 2", "save 3", "commit 3"),  # nothing is saved, or just
    ("line 2", "commit state", "step 4", "evaluate 3", "restore"),
    ("step 5", "restore", "commit 6", "evaluate 6", "remove 3"),
    ("line 4", "restore", "file .eval-samples-8", "file .eval-captions-8"),
    ("line 6", "save 6", "step 7", "commit 8", "evaluate 8", "file .metrics.json"),
    ("anywhere",) * 5,
)
# Seconds that the program stays about there, at least; it is killed at a random moment of them.
WITHIN = {
    "init": 0.2,
    "restore": 0.3,
    "remove": 0.1,
    "step": 0.05,
    "line": 0.15,
    "save": 0.04,
    "commit": 0.4,
    "evaluate": 2,
    "file": 0.25,
    "anywhere": 1,
}
LIMIT = 900.0  # seconds of one process


def start(folder, cache):
    """The command of a person, in a fresh process on one device, and the file in which it says where it is."""
    marks = folder / f"marks-{time.monotonic_ns()}"
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"XDG_CACHE_HOME": str(cache)}
    env["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    command = [sys.executable, "tests/faults/slowed.py", str(marks), *FLAGS, f"--workdir={folder / 'run'}"]
    with open(folder / "out", "a") as out:
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=subprocess.STDOUT), marks


def whole(folder, cache):
    """Runs to the end; how many marks it made."""
    process, marks = start(folder, cache)
    assert process.wait(LIMIT) == 0, (folder / "out").read_text()
    return len(marks.read_text().splitlines())


def kill(folder, cache, target, rng, usual):
    """Starts the run, kills it at `target`, and returns the last mark; None when it came to its end before."""
    process, marks = start(folder, cache)
    due, number = time.monotonic() + LIMIT, rng.randrange(1, usual)
    try:
        while time.monotonic() < due and process.poll() is None:
            told = marks.read_text() if marks.exists() else ""
            if target in told or (target == "anywhere" and told.count("\n") >= number):
                time.sleep(rng.random() * WITHIN[target.split()[0]])
                break
            time.sleep(0.003)
        if process.poll() is not None:
            assert process.returncode == 0, (folder / "out").read_text()
            return None
    finally:
        process.kill()
        process.wait()
    return marks.read_text().splitlines()[-1]


def killed(folder, cache, plan, rng, usual):
    """Kills a run as planned and then lets it come to its end; the last mark of each killed process."""
    folder.mkdir()
    found = [kill(folder, cache, target, rng, usual) for target in plan]
    whole(folder, cache)
    return [mark for mark in found if mark]


def logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", *CLOCK)} for line in lines]


def events(run):
    """What TensorBoard's files hold, by step and name; several processes may have told the same."""
    told = collections.defaultdict(set)
    for path in (run / "tensorboard").iterdir():
        for event in events_of(path):
            for value in event.summary.value:
                if value.tag not in CLOCK:
                    told[event.step, value.tag].add(value.SerializeToString())
    return dict(told)


def final(run):
    """The last checkpoint: the arrays by path, where the data were, and what was said about it."""
    import orbax.checkpoint as ocp

    folder = max((run / "checkpoints").iterdir(), key=lambda p: int(p.name))
    arrays = ocp.PyTreeCheckpointer().restore(folder / "state")
    data, meta = (json.loads((folder / item / "metadata").read_text()) for item in ("data", "meta"))
    return folder.name, arrays, data, meta


def flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: np.asarray(tree)}
    return {k: v for name, inner in tree.items() for k, v in flat(inner, f"{prefix}/{name}").items()}


def assert_alike(run, other):
    """Everything that a run leaves, but for what the clock says."""
    step, arrays, data, meta = final(run)
    assert (step, data, meta) == (final(other)[0], *final(other)[2:])
    ours, theirs = flat(arrays), flat(final(other)[1])
    assert ours.keys() == theirs.keys() and {"/step", "/extra/seed"} <= ours.keys()
    assert {path.split("/")[1] for path in ours} == {"step", "params", "ema", "opt_state", "extra"}
    for path, value in ours.items():
        assert value.dtype == theirs[path].dtype and value.tobytes() == theirs[path].tobytes(), path
    assert logged(run) == logged(other)
    metrics = [json.loads((r / "metrics.json").read_text()) for r in (run, other)]
    first, second = ({k: v for k, v in m.items() if not k.startswith(("seconds", "goodput"))} for m in metrics)
    assert first == second
    pictures = [{p.name: p.read_bytes() for p in (r / "samples").iterdir()} for r in (run, other)]
    assert pictures[0] == pictures[1] and len(pictures[0]) == 9
    scores = [json.loads((r / "scores.json").read_text()) for r in (run, other)]
    for kept in ("6", "8"):  # those of removed checkpoints go with a later one
        assert scores[0][kept] == scores[1][kept]
    assert events(run) == events(other)
    assert {p.name for p in run.iterdir()} == {p.name for p in other.iterdir()}, "no damaged/, no leftovers"
    assert not [p for p in run.rglob("*") if "tmp" in p.name or p.name.startswith(".probe")]


@pytest.mark.faults
@pytest.mark.timeout(3000)
def test_a_run_killed_at_any_moment_ends_as_if_nothing_had_happened(tmp_path):
    reference, cache = tmp_path / "reference", tmp_path / "cache"
    reference.mkdir()
    whole(reference, cache)
    (tmp_path / "warm").mkdir()
    usual = whole(tmp_path / "warm", cache)
    assert_alike(tmp_path / "warm" / "run", reference / "run")
    assert [line["step"] for line in logged(reference / "run")] == [1, 2, *5 * [3], 4, *5 * [6], *5 * [8]]
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(killed, tmp_path / f"killed-{i}", cache, plan, random.Random(i), usual)
            for i, plan in enumerate(PLANS)
        ]
        marks = [mark for job in jobs for mark in job.result()]
    told = collections.Counter(mark.split()[0] for mark in marks)
    print(f"{len(marks)} kills, last seen at: {dict(told)}; {sorted(marks)}")
    assert len(marks) >= 20 and set(WITHIN) - set(told) == {"anywhere"}
    for i in range(len(PLANS)):
        assert_alike(tmp_path / f"killed-{i}" / "run", reference / "run")
