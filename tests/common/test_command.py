"""How the programs of the command line end."""

import os
import subprocess
import sys

import pytest
from absl import flags

from src.common.runtime import command

PROGRAM = """
import sys
from src.common.runtime import command
def work():
    {}
sys.exit(command.run(work, None, "stopped"))
"""


def run(body, **streams):
    return subprocess.run([sys.executable, "-c", PROGRAM.format(body)], stderr=subprocess.PIPE, text=True, **streams)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ("return 2", 2, ""),
        ("print('done')", 0, ""),
        ("raise ValueError('--x=1 is wrong: give 2')", 1, "error: --x=1 is wrong: give 2\n"),
        ("raise KeyError('no such key: give another')", 1, "error: no such key: give another\n"),
        ("raise KeyboardInterrupt", 130, "stopped\n"),
    ],
)
def test_an_error_is_one_sentence_and_an_exit_code(body, code, told, capsys):
    space = {}
    exec(PROGRAM.format(body).replace("sys.exit(", "code = (").replace("import sys\n", ""), space)
    assert (space["code"], capsys.readouterr().err) == (code, told)


def test_a_reader_that_leaves_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = run("print('much')", stdout=writer)
    assert (done.returncode, done.stderr) == (0, "")


def test_closed_streams_and_little_memory():
    program = [sys.executable, "-c", PROGRAM.format("print('x')")]
    assert subprocess.run(["bash", "-c", '"$@" >&- 2>&-', "-", *program]).returncode == 0
    done = subprocess.run(["bash", "-c", 'ulimit -v 1000000; "$@"', "-", *program], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.startswith("error: the memory of this process is limited to 1 GB")


def test_whole_tracebacks_on_demand():
    values = flags.FlagValues()
    flags.DEFINE_boolean("traceback", False, "", flag_values=values)

    def work():
        raise ValueError("wrong")

    values(["program"])
    assert command.run(work, values) == 1
    values.traceback = True
    with pytest.raises(ValueError, match="wrong"):
        command.run(work, values)
