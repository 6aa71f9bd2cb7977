"""What the cases share that train: a small config, forty chats, and a run of `src.main` in a process of its own."""

import os
import subprocess
import sys

from tests.cases.made import TMP

QUICK = ["--config.steps=3", "--config.log.every=1", "--config.checkpoint.every=2", "--config.doctor.checks=False"]
QUICK += ["--config.doctor.drawings=0", "--config.doctor.batches=0"]
CONFIG = TMP / "mini.py"
CONFIG.write_text("""from configs import common


def get_config(name=None):
    config = common.base()
    config.steps, config.batch = 4, 4
    config.fields = {"text": common.text(name="text:Bytes")}
    source = {"name": "ultrachat", "folder": ""}
    template = {"name": "chat", "length": 64}
    objectives = {"text": common.next_token("text")}
    config.tasks = {"chat": {"weight": 1.0, "source": source, "template": template, "objectives": objectives}}
    return common.variant(config, name)
""")
(TMP / "chats").mkdir()
(TMP / "chats/a.jsonl").write_text('{"data": ["what is it?", "a dog"]}\n' * 40)
DATA = f"--config.tasks.chat.source.folder={TMP / 'chats'}"


def run(*flags, env=(), cwd=None, before=()):
    """Trains for a few steps: exit code, the lines that begin with `error`, and all lines."""
    command = [*before, sys.executable, "-m", "src.main", f"--config={CONFIG}:debug", DATA, *QUICK, *flags]
    env = os.environ | {"PYTHONPATH": os.getcwd()} | dict(env)
    done = subprocess.run(command, capture_output=True, env=env, cwd=cwd)
    said = (done.stderr + done.stdout).decode(errors="replace").strip().splitlines()
    return done.returncode, [line for line in said if line.startswith("error")], said
