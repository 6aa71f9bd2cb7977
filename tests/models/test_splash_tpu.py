"""What the real TPU compiler makes of attention on packed rows, where libtpu is installed."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.faults
@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.parametrize("words", [(), ("array",)])
def test_one_kernel_for_all_rows_without_an_array_of_the_mask(words):
    """Forward and two kernels backward, no loop over the rows; a mask that is an array is skipped in the same way."""
    command = [sys.executable, "-m", "tests.packed_bench", "3", "1024", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["kernels"], found["loops"]) == (3, 0)
    assert (found["largest_array_of_integers"] < 3 * 1024 * 1024) == (not words)
