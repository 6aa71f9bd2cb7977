"""Traces of some steps of a run, which xprof, TensorBoard and Perfetto open: `--profile=STEP[:COUNT]`, or SIGUSR1.

`<workdir>/profile/<step>/` is the folder for TensorBoard; below it JAX writes `plugins/profile/<time>/`, and beside its
files stand `perfetto_trace.json.gz` and `scopes.txt` (see `trace_files.py`). Of several processes each has a folder
`process_<number>` of its own. A trace has no effect on the steps, and one that fails does not stop the run.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

from absl import logging
from etils import epath

from src.common.files.store import is_remote, write_whole
from src.common.runtime import errors, stopping, trace_files

FOLDER = "profile"
COUNT = 5  # steps of a trace, unless told


@dataclasses.dataclass(frozen=True)
class Steps:
    """Steps `first` to `last`; the first step of a run is 1, as in its log."""

    first: int
    last: int

    def __str__(self) -> str:
        return f"step {self.first}" if self.first == self.last else f"steps {self.first} to {self.last}"


def parse_steps(text: str, total: Any = None) -> Steps:
    """The steps that `--profile=STEP[:COUNT]` names, of a run of `total` steps.

    Raises ValueError, in one sentence, for another form, and for a STEP that the run does not have.
    """
    found = re.fullmatch(r"([0-9]{1,15})(?::([0-9]{1,15}))?", text)
    first, count = (int(found[1]), int(found[2] or COUNT)) if found else (0, 0)
    if not first or not count:
        raise ValueError(f"--profile={text} is no STEP or STEP:COUNT, both from 1 on: write --profile=100:5")
    if isinstance(total, int) and first > total:
        raise ValueError(f"--profile={text} begins after the last step, {total}: give a smaller STEP")
    return Steps(first, first + count - 1)


class Tracer:
    """Writes the traces of a run that were asked for.

    workdir   the run's folder, also in a store; None: nothing is traced
    steps     a trace to make, or None; another may be asked for at any time (`stopping.trace_asked`)
    program   gives the text of the compiled step, whose operations then get the names of their scopes
    """

    def __init__(
        self,
        workdir: str | os.PathLike[str] | None = None,
        steps: Steps | None = None,
        program: Callable[[], str] | None = None,
    ):
        self.workdir, self.steps, self.program = workdir, steps, program
        self.running: Steps | None = None
        self._asked: Steps | None = None  # by a signal
        self._folder: epath.Path | None = None
        self._local: tempfile.TemporaryDirectory | None = None

    def due(self, done: int) -> bool:
        """Whether a trace begins or ends here, after `done` steps and before the next one. Call it once there."""
        if stopping.trace_asked():
            if self.running:
                logging.warning("a trace of %s is being made: the second request is left out", self.running)
            else:
                self._asked = Steps(done + 1, done + COUNT)
        if self.running:
            return done >= self.running.last
        if self.steps and self.steps.last <= done:
            logging.warning("no trace is made of %s: the run goes on after step %d", self.steps, done)
            self.steps = None
        return self._next(done) is not None

    def change(self, done: int) -> None:
        """Ends the trace that is due to end, and begins the one that is due to begin; the device must be idle."""
        if self.running and done >= self.running.last:
            self._end(done)
        if steps := self._next(done):
            self._begin(Steps(done + 1, steps.last))

    def close(self, done: int) -> None:
        """Ends a trace when no further step comes."""
        if self.running:
            self._end(done)
        if stopping.trace_asked():
            logging.warning("no trace is made: there is no step after step %d in this process", done)

    # ----------------------------------------------------------------------- within

    def _next(self, done: int) -> Steps | None:
        """The steps of the trace that begins after `done` steps."""
        if self.running or self.workdir is None:
            return None
        wanted = (self._asked, self.steps)
        return next((steps for steps in wanted if steps and steps.first <= done + 1 <= steps.last), None)

    def _begin(self, steps: Steps) -> None:
        import jax

        if self._asked:
            self._asked = None
        else:
            self.steps = None
        folder = epath.Path(self.workdir) / FOLDER / str(steps.first)
        if jax.process_count() > 1:
            folder /= f"process_{jax.process_index()}"
        try:
            _check(folder)
            self._local = tempfile.TemporaryDirectory(prefix="trace-")  # JAX makes no trace any more after a failed one
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every call of Python would be an event
            jax.profiler.start_trace(self._local.name, profiler_options=options)
        except Exception as error:
            if self._local:
                self._local.cleanup()
            self._give_up(steps, folder, error)
            return
        self.running, self._folder = steps, folder
        logging.info("tracing %s", steps)

    def _end(self, done: int) -> None:
        import jax

        steps, self.running = Steps(self.running.first, done), None
        local = pathlib.Path(self._local.name)
        try:
            jax.profiler.stop_trace()
            told = trace_files.complete(local, steps.last - steps.first + 1, self.program)
            _copy(local, self._folder)
        except Exception as error:
            self._give_up(steps, self._folder, error)
            return
        finally:
            self._local.cleanup()
        logging.info("the trace of %s is in %s%s", steps, self._folder, told and f"; {told}")

    def _give_up(self, steps: Steps, folder: epath.Path, error: Exception) -> None:
        logging.warning("the trace of %s cannot be written to %s (%s): training goes on", steps, folder,
                        errors.explain(error))  # fmt: skip


def _check(folder: epath.Path) -> None:
    """Raises OSError where nothing can be written into a folder of this machine; makes it."""
    if not is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()


def _copy(source: pathlib.Path, target: epath.Path) -> None:
    """Copies the files of a folder, also into a store."""
    for path in source.rglob("*"):
        if path.is_file():
            write_whole(target / path.relative_to(source).as_posix(), path.read_bytes())
