"""Workers of a stream where the shared memory is too small: one sentence that names it and the ways out."""

import errno
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from src.data.pipeline.stream import Stream

ROOT = pathlib.Path(__file__).parents[2]


class Rows:
    """A hundred rows of many bytes."""

    draws = 1

    def rows(self, split):
        return 100

    def read(self, split, index, uniforms):
        return {"a": np.full(1_000_000, index, np.uint8)}

    def blank(self):
        return {"a": np.zeros(1_000_000, np.uint8)}

    def build(self, rows):
        return rows["a"].sum()


class Broken:
    """An iterator of Grain whose workers fail."""

    def __init__(self, error):
        self.error = error

    def __next__(self):
        raise self.error

    def close(self):
        pass


def stream(monkeypatch, error, workers=2):
    found = Stream(Rows(), 16, 0, workers=workers, name="say")
    monkeypatch.setattr(found, "_open", lambda: Broken(error))
    return found


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search the logs above."),
    ],
    ids=["no space", "SIGBUS"],
)
def test_a_small_shared_memory_is_named(monkeypatch, error):
    told = r"task say: the shared memory \(/dev/shm.*\) is too small .*data.workers=2: give it more, .*data.workers=0"
    with pytest.raises(RuntimeError, match=told) as raised:
        next(stream(monkeypatch, error))
    assert "\n" not in str(raised.value)


def test_other_faults_are_told_as_they_are(monkeypatch):
    with pytest.raises(OSError, match="Input/output"):
        next(stream(monkeypatch, OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="No space left"):  # threads need no shared memory: it is the disk
        next(stream(monkeypatch, OSError(errno.ENOSPC, "No space left on device"), workers=0))


@pytest.mark.faults
@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="mounts a small /dev/shm: needs root")
@pytest.mark.parametrize(("size", "told"), [("64k", "0.0655 MB"), ("20m", "21 MB"), ("200m", "")])
def test_shared_memory_of_any_size(size, told):
    code = f"""
import sys
if __name__ == "__main__":
    sys.path.insert(0, {str(ROOT)!r})
    from tests.data.test_workers import Rows, Stream
    stream = Stream(Rows(), 16, 0, workers=1, name="say")
    print("sums", [int(next(stream)) for _ in range(4)])
    stream.close()
"""
    mount = f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "-m", "bash", "-c", mount, "x", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    if told:
        assert f"RuntimeError: task say: the shared memory (/dev/shm, {told}) is too small" in done.stderr
    else:
        assert done.returncode == 0 and "sums [" in done.stdout, done.stderr
