"""Faults 16 and 17, as a person meets them: a run whose disk is full, or cannot be written at all."""

import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from tests.helpers.one_run import QUIET

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def mount():
    """Mounts something, where that is allowed, and unmounts it at the end."""
    mounted = []

    def on(folder, *arguments):
        folder.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(["mount", *arguments, str(folder)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)

    yield on
    for folder in reversed(mounted):
        subprocess.run(["umount", "-l", str(folder)], check=True)


def train(workdir, *arguments):
    """Exit code, standard error and seconds of a short run on one device."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    flags = ["--config=configs/digits.py:debug", f"--workdir={workdir}", *QUIET]
    command = [sys.executable, "-m", "src.main", *flags, *arguments]
    began = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)
    return done.returncode, done.stderr, time.monotonic() - began


@pytest.mark.faults
def test_a_run_on_a_full_disk_trains_to_its_end_and_fails(mount, tmp_path):
    workdir = tmp_path / "run"
    mount(workdir / "checkpoints", "-t", "tmpfs", "-o", "size=64k", "none")
    code, said, _ = train(workdir)
    assert code == 1, said
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: the last checkpoint was not written: step 8: the disk is full"), last
    assert "step 4: the disk is full" in said and "training goes on and the next save is tried" in said
    assert "never retrieved" not in said, "not one trace for every leaf"
    steps = [json.loads(line)["step"] for line in (workdir / "log.jsonl").read_text().splitlines()]
    assert max(steps) == 8
    assert not list((workdir / "checkpoints").iterdir()), "nothing is left in the way"
    subprocess.run(["mount", "-o", "remount,size=64m", str(workdir / "checkpoints")], check=True)
    code, said, _ = train(workdir)
    assert code == 0, said


@pytest.mark.faults
@pytest.mark.parametrize("what", ["workdir", "checkpoints", "file", "no checkpoints"])
def test_a_place_that_cannot_be_written_is_refused_before_the_first_step(mount, tmp_path, what):
    workdir = tmp_path / "run"
    workdir.mkdir()
    if what == "workdir":
        mount(workdir, "-t", "tmpfs", "-o", "size=64k,ro", "none")
    elif what == "checkpoints":
        mount(workdir / "checkpoints", "-t", "tmpfs", "-o", "size=64k,ro", "none")
    elif what == "file":
        workdir.rmdir()
        workdir.write_text("in the way")
    else:
        (workdir / "checkpoints").write_text("in the way")
    code, said, seconds = train(workdir)
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: ") and "cannot be written" in last and str(workdir) in last, said
    assert "step 1" not in said and "Traceback" not in said
    assert seconds < 120, "it does not hang at its end"
