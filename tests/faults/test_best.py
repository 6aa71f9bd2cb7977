"""A run keeps the best checkpoint by an evaluator's score, saved where it was scored, and shows it on request."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.one_run import QUIET

ROOT = pathlib.Path(__file__).parents[2]


def command(workdir, *arguments):
    flags = ["--config=configs/digits.py:debug", f"--workdir={workdir}", "--config.eval.every=2"]
    flags += ["--config.checkpoint.every=0", "--config.checkpoint.keep=1"]
    flags += ["--config.checkpoint.best.metric=text_accuracy"]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    call = [sys.executable, "-m", "src.main", *flags, *QUIET, *arguments]
    return subprocess.run(call, cwd=ROOT, env=env, capture_output=True, text=True, timeout=280)


@pytest.mark.faults
def test_the_best_by_a_score(tmp_path):
    done = command(tmp_path)
    assert done.returncode == 0, done.stderr
    scores = {int(step): each for step, each in json.loads((tmp_path / "scores.json").read_text()).items()}
    there = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    best = max(scores, key=lambda step: (scores[step]["text_accuracy"], step))
    assert there == sorted({best, 8})
    done = command(tmp_path, "--mode=eval", "--step=best")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["steps"] == best
    assert metrics["text_accuracy"] == pytest.approx(scores[best]["text_accuracy"], abs=1e-5)
    done = command(tmp_path, "--mode=eval", "--step=4000")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("error: there is no checkpoint of step 4000 in")
    done = command(tmp_path, "--step=best")
    assert done.returncode == 1 and "--step=best is for --mode=eval and sample" in done.stderr
