"""Each folder here holds a check of one report; it runs in a process of its own, from the repository's root."""

import os
import pathlib
import subprocess
import sys

import pytest

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parent.parent
TRAINS = {"name-that-is-no-utf8", "small-shared-memory", "steps-raised-under-a-cosine", "tilde"}  # long: they train
NAMES = sorted(file.parent.name for file in HERE.glob("*/check.py"))


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.faults] if n in TRAINS else []) for n in NAMES])
def test_case(name):
    env = os.environ | {"PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    check = [sys.executable, str(HERE / name / "check.py")]
    done = subprocess.run(check, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
