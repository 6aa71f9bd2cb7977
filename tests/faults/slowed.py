"""The program, saying where it is and slow there, so that a test can kill it in the middle of things.

    python tests/faults/slowed.py MARKS --config=… --workdir=…

appends a line such as "step 3" to the file MARKS where the third step begins.
"""

import asyncio
import os
import sys
import time

MARKS = os.open(sys.argv.pop(1), os.O_WRONLY | os.O_APPEND | os.O_CREAT)


def mark(text, seconds=0.0):
    """Says where the program is, and stays there for a while."""
    os.write(MARKS, f"{text}\n".encode())
    time.sleep(seconds)


class Halves:
    """A file whose lines are written in two pieces."""

    def __init__(self, handle):
        self._handle = handle

    def __getattr__(self, name):
        return getattr(self._handle, name)

    def write(self, line):
        middle = len(line) // 2
        self._handle.write(line[:middle])
        self._handle.flush()
        mark(f"line {line.split(b',')[0].split()[-1].decode()}", 0.2)
        self._handle.write(line[middle:])


def slow_down():
    """Puts marks into the classes of the program."""
    from etils import epath
    from orbax.checkpoint._src.path import atomicity

    from src.common.runtime import writers
    from src.train import loop, trainer
    from src.train.checkpoints import checkpointer, metadata, retention

    def around(owner, name, text, before=0.0, after=0.0):
        inner = getattr(owner, name)

        def outer(*arguments, **options):
            if said := text(*arguments):
                mark(said, before)
            result = inner(*arguments, **options)
            time.sleep(after)
            return result

        setattr(owner, name, outer)

    around(trainer.Trainer, "init", lambda self: "init", 0.1, 0.1)
    around(loop.Run, "advance", lambda run: f"step {run.step + 1}", 0.02, 0.05)
    around(checkpointer.Checkpointer, "save", lambda self, step, *_: f"save {step}", 0.05)
    around(metadata, "read", lambda *_: "restore", 0.1, 0.2)
    around(retention, "remove", lambda folder: f"remove {folder.name}", 0.1, 0.1)
    around(loop, "evaluate", lambda system, state, writer, step, *_: f"evaluate {step}")
    around(type(epath.Path("/")), "replace", lambda draft, *_: drafted(draft.name), 0.3)

    def drafted(name):
        return "" if "lock" in name else f"file {name}"  # the lock is written again and again, by the clock

    opened = writers.JsonLinesWriter._open
    writers.JsonLinesWriter._open = lambda self: Halves(opened(self))

    finalize = atomicity.AtomicRenameTemporaryPath.finalize

    async def slow_finalize(self):
        mark(f"commit {self._final_path.name}")
        await asyncio.sleep(0.3)
        await finalize(self)
        await asyncio.sleep(0.1)

    atomicity.AtomicRenameTemporaryPath.finalize = slow_finalize


if __name__ == "__main__":
    mark("start")
    sys.path.insert(0, os.getcwd())
    from src import main

    slow_down()
    sys.exit(main.main(sys.argv))
