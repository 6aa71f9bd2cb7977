"""What a shell does to a run: closed streams, a full disk behind them, limits of memory, files and sizes."""

import os
import pathlib
import subprocess
import sys

import pytest

from tests.helpers.one_run import QUIET

ROOT = pathlib.Path(__file__).parents[2]


def run(folder, before="", after="", *flags):
    """Exit code, standard output and standard error of a debug run under a shell's limits and redirections."""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "PYTHONUNBUFFERED")}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "XDG_CACHE_HOME": str(folder / "cache")}
    command = f'{before} exec "$0" -m src.main --config=configs/digits.py:debug "$@" {after}'
    words = ["bash", "-c", command, sys.executable, f"--workdir={folder / 'run'}", *QUIET, *flags]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize("after", ["2>&-", ">&-", "<&- >&- 2>&-", "> /dev/full", "2> /dev/full", "> /dev/full 2>&1"])
def test_a_run_trains_whatever_its_streams_are(tmp_path, after):
    code, _, told = run(tmp_path, "", after)
    assert code == 0, told
    assert (tmp_path / "run" / "metrics.json").exists() and (tmp_path / "run" / "checkpoints" / "8").is_dir()
    if after == "> /dev/full":
        lost = "standard output cannot be written (No space left on device): what was to be shown there is lost"
        assert f"{lost}; it is in {tmp_path / 'run' / 'metrics.json'}" in told.splitlines()[-1]


@pytest.mark.faults
@pytest.mark.parametrize("limit", ["-v 1000000", "-v 1500000", "-v 2000000", "-d 900000"])
def test_little_memory_is_one_sentence(tmp_path, limit):
    code, _, told = run(tmp_path, f"ulimit {limit};")
    last = told.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: the memory of this process is limited to"), told
    assert f"raise the limit (ulimit {limit[:2]} unlimited)" in last and "tokenizer" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_a_limit_of_the_size_of_files_is_told_as_such(tmp_path):
    code, _, told = run(tmp_path, "ulimit -f 100;", "", "--config.model.trunk.width=256")
    last = told.strip().splitlines()[-1]
    assert code == 1 and "a file is too large" in last and "ulimit -f" in last and "free space" not in told, told
