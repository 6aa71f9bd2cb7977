"""Text that a terminal cannot show is escaped, and neither lost nor an error."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CODE = r"""
import sys
from src.common.runtime import terminal
terminal.escape()
print("gr\xf6\xdfe \u72ac \udcfc")
print("gr\xf6\xdfe \u72ac \udcfc", file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("env", "said"),
    [
        ({"PYTHONIOENCODING": "ascii"}, r"gr\xf6\xdfe \u72ac \udcfc"),
        ({"PYTHONIOENCODING": "ascii:strict"}, r"gr\xf6\xdfe \u72ac \udcfc"),
        ({"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, r"gr\xf6\xdfe \u72ac \udcfc"),
        ({"PYTHONIOENCODING": "latin-1"}, r"größe \u72ac \udcfc"),
        ({"PYTHONIOENCODING": "utf-8"}, r"größe 犬 \udcfc"),
    ],
)
def test_what_a_terminal_cannot_show_is_escaped(env, said):
    done = subprocess.run([sys.executable, "-c", CODE], cwd=ROOT, env=os.environ | env, capture_output=True)
    encoding = "latin-1" if "latin-1" in env.values() else "utf-8"
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode(encoding).strip() == done.stderr.decode(encoding).strip() == said


def test_streams_that_are_closed_or_of_another_kind_are_left_alone():
    code = "import io, sys; sys.stdout, sys.stderr = None, io.StringIO()\n"
    code += "from src.common.runtime import terminal; terminal.escape()"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_program_answers_on_an_ascii_terminal(tmp_path):
    name = tmp_path / "größe.py"
    command = [sys.executable, "-m", "src.main", f"--config={name}", "--workdir=x"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONIOENCODING": "ascii:strict"}, capture_output=True, text=True
    )
    assert done.returncode == 1 and r"gr\xf6\xdfe.py" in done.stderr and done.stderr.count("\n") == 1
