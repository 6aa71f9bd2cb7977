"""A place where the launch scripts run without a cloud: used by the tests of the scripts and of the workers."""

import os
import pathlib
import shlex
import shutil
import subprocess
import time

ROOT = pathlib.Path(__file__).parents[2]
PROGRAMS = "gcloud xpk kubectl srun git curl python3 pip ssh"


class Sandbox:
    """A copy of the scripts, with recording programs first in the path and a Python that obeys the test."""

    def __init__(self, folder):
        self.folder, self.calls = folder, folder / "calls"
        shutil.copytree(ROOT / "launch", folder / "code/launch")
        for file in ROOT.glob("requirements*.txt"):
            shutil.copy(file, folder / "code")
        (folder / "bin").mkdir()
        for name in PROGRAMS.split():
            self.program(
                f"bin/{name}",
                # One write a line, as calls may come side by side.
                f'line=$(printf %s {name}; printf "\\x1f%s" "$@"); echo "$line" >>{self.calls}\n'
                '[[ "$*" == *"list-instances"*"value(name)"* ]] && printf "trial-a\\ntrial-b\\n"; true',
            )
        keep = {"HOME": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}", "LANG": "C.UTF-8"}
        self.environment = keep | {"VENV": str(folder / "venv")}

    def program(self, path, text):
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(f"#!/usr/bin/env bash\n{text}\n")
        target.chmod(0o755)

    def python(self, text):
        """The environment's Python: it accepts every check, and `text` is what `-m src.main` does."""
        self.program("venv/bin/python", f'[[ "$1 $2" == "-m src.main" ]] || exit 0\n{text}')
        self.program("venv/bin/pip", "true")

    def start(self, *words, **environment):
        return subprocess.Popen(
            # A suite that runs in the background ignores Ctrl-C, and so would what it starts.
            ["env", "--default-signal=INT", "bash", *words],
            cwd=self.folder / "code", env=self.environment | environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def run(self, *words, **environment):
        process = self.start(*words, **environment)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    def called(self):
        """What was called since the last question: a sorted list of words, as some run side by side."""
        lines = self.calls.read_text().splitlines() if self.calls.exists() else []
        self.calls.unlink(missing_ok=True)
        return sorted(line.split("\x1f") for line in lines)

    def dry(self, script, *words, **environment):
        """The lines that --dry-run prints, as words; nothing was called or written, and bash can read them."""
        before = sorted(self.folder.rglob("*"))
        code, out, err = self.run(f"launch/{script}", "--dry-run", *words, **environment)
        assert code == 0, err
        assert self.called() == []
        assert sorted(self.folder.rglob("*")) == before
        assert subprocess.run(["bash", "-n"], input=out, text=True).returncode == 0, out
        self.text = out
        return [shlex.split(line) for line in out.splitlines()]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "this took too long"
        time.sleep(0.02)


def alive(pid):
    """Whether the process exists and is not a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
