"""Closed streams, full disks behind them, and little memory, in small programs of their own."""

import errno
import os
import pathlib
import resource
import subprocess
import sys

import pytest

from src.common.runtime import errors, limits

ROOT = pathlib.Path(__file__).parents[2]


def program(text, redirect):
    """Exit code, standard output and standard error of a Python program under a shell's redirection."""
    command = ["sh", "-c", f'exec "$0" -c "$1" {redirect}', sys.executable, text]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


OPEN = "from src.common.runtime import streams\nstreams.keep_open()\nimport os, sys\n"


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "<&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_gets_the_number_of_a_closed_stream(tmp_path, redirect):
    """Who writes to standard error by its number, as libraries in C++ do, writes into no file of ours."""
    text = OPEN + f"file = open({str(tmp_path / 'kept')!r}, 'w')\n"
    text += "os.write(1, b'one'), os.write(2, b'two')\nfile.write(str(file.fileno())), file.flush()\n"
    text += "import faulthandler; faulthandler.dump_traceback(file=sys.__stderr__)\n"
    text += "print('out'), print('err', file=sys.stderr), sys.stderr.isatty(), streams.say('x'), streams.tell('y')\n"
    assert program(text, redirect)[0] == 0
    assert int((tmp_path / "kept").read_text()) > 2


def test_without_it_a_file_gets_the_number():
    """That the test above can fail."""
    assert program("import os; assert os.open(os.devnull, os.O_RDONLY) == 2", "2>&-")[0] == 0


def test_what_is_only_shown_must_be_shown():
    said = OPEN + "try:\n    streams.say('text')\nexcept OSError as error:\n    streams.tell(error)\n    sys.exit(3)\n"
    code, _, told = program(said, "> /dev/full")
    assert code == 3
    assert told == "standard output cannot be written (No space left on device): what was to be shown there is lost\n"
    assert program(OPEN + "streams.say('text')", "")[:2] == (0, "text\n")
    assert program(OPEN + "print('x' * 10)\nstreams.drain()", "> /dev/full")[0] == 0, "120 without `drain`"
    assert program(OPEN + "print('x' * 10)", "> /dev/full")[0] == 120, "as Python ends"
    assert program(OPEN + "streams.tell('x' * 10000)\nstreams.drain()", "2> /dev/full")[0] == 0


@pytest.mark.parametrize("name", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_little_memory_is_told_before_a_library_aborts(monkeypatch, name):
    def limited(most):
        unlimited = resource.RLIM_INFINITY
        monkeypatch.setattr(
            resource, "getrlimit", lambda number: (most if number == getattr(resource, name) else unlimited, unlimited)
        )
        return limits.check_memory()

    assert limited(resource.RLIM_INFINITY) == "" and limited(64 << 30) == ""
    assert limits.LIMITS[name][0] in limited(4 << 30) and "4.3 GB" in limited(4 << 30)
    for most in (0, 1 << 20, 1 << 30):
        with pytest.raises(MemoryError, match=rf"{limits.LIMITS[name][0]}.*raise the limit"):
            limited(most)


def test_memory_of_the_host_is_one_sentence():
    assert "memory" in errors.in_words(MemoryError()) and "\n" not in errors.in_words(MemoryError())
    assert "memory" in errors.in_words(MemoryError("std::bad_alloc"))
    assert errors.in_words(MemoryError("Unable to allocate 9.1 GiB for an array")).startswith(
        "Unable to allocate 9.1 GiB"
    )


ADVICE = {
    errno.ENOSPC: "free space in /run", errno.EDQUOT: "free space in /run", errno.EPERM: "right to write in /run",
    errno.EACCES: "right to write in /run", errno.EMFILE: "ulimit -n", errno.ENFILE: "ulimit -n",
    errno.EFBIG: "ulimit -f", errno.EROFS: "mount /run for writing",
    errno.EIO: "disk or network", errno.ESTALE: "disk or network",
    errno.ENOENT: "who removed", errno.ENOTDIR: "who removed", errno.ENOMEM: "memory",
    errno.EEXIST: "disk or store of /run", errno.EINVAL: "disk or store of /run",
}  # fmt: skip


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
def test_only_a_full_disk_is_told_to_be_full(number):
    """As Python's error, deep in a chain, and as the text alone that TensorStore gives."""
    plain, deep = OSError(number, os.strerror(number), "/run/a"), ValueError("not saved")
    deep.__cause__ = RuntimeError("x")
    deep.__cause__.__context__ = plain
    text = ValueError(f"UNKNOWN: Error writing /run/d/0 [OS error {number}: {os.strerror(number)}]")
    for error in (plain, deep, text):
        reason = errors.explain(error)
        advice = errors.way_out(f"step 4: {reason}", "/run")
        assert ADVICE[number] in advice and reason.count("\n") == 0
        assert ("free space" in advice) == ("the disk is full" in reason) == (number in (errno.ENOSPC, errno.EDQUOT))
    assert errors.explain(ValueError("other")) == "ValueError: other"
