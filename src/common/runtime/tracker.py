"""Trackers: services that show many runs side by side (W&B, MLflow), behind the protocol of the writers.

What a run writes is put into a queue, and a thread hands it to the service, on process 0 alone. A service that hangs or
fails never delays or stops a run: what does not fit into the queue is left out and counted, a failure is told once, and
the service is opened again later. `log.jsonl` always has everything.

The id of the run lies in `trackers.json` of the workdir, so that a resumed run goes on in the same run of the service.
Without that file a new one begins. A tracker cannot take anything back: steps that a killed run had logged after its
last checkpoint are logged again, with the same values.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import queue
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import TimeoutError as TooSlow
from typing import Any, ClassVar

import jax
from absl import logging
from etils import epath

from src.common.files.store import write_whole
from src.common.files.strict_json import read_json
from src.common.lookup import lookup
from src.common.runtime import background
from src.common.runtime.writers import to_uint8

FOLDER = "common/runtime/trackers"
IDS = "trackers.json"
ROOM = 1000  # entries that wait for the service
PAUSE = 60.0  # seconds after a failure before the service is opened again
FAREWELL = 30.0  # seconds at the end for what still waits
RUNS = "monoformer-jax"  # project or experiment, where the environment names none


class Tracker:
    """A writer that hands scalars, images and texts to a service. Subclasses say how, in the four methods below, which
    run in one background thread.

    NAME      of the tracker in `trackers.json`
    PACKAGE   that must be installed
    workdir   of the run; the last part of its path is the name of the run
    config    values by dotted name, `{"optim.lr": 0.001}`
    """

    NAME: ClassVar[str]
    PACKAGE: ClassVar[str]

    def __init__(self, workdir: Any, config: Mapping[str, Any]):
        self.workdir, self.config, self.lost = epath.Path(workdir), dict(config), 0
        self._queue: queue.Queue[tuple[str, int, dict[str, Any]] | None] = queue.Queue(ROOM)
        self._active = jax.process_index() == 0
        self._thread: Any = None
        self._handle: Any = None
        self._again, self._warned = 0.0, False

    @classmethod
    def check(cls) -> None:
        """Raises ValueError, in one sentence, when the tracker cannot work here. May be extended."""
        if importlib.util.find_spec(cls.PACKAGE) is None:
            raise ValueError(
                f"log.trackers has {cls.NAME!r}, but the package {cls.PACKAGE} is not installed: run pip install -r"
                " requirements-trackers.txt, or leave it out"
            )

    def open(self, run: str | None) -> tuple[Any, str]:
        """(handle, id) of a run of the service: that of the id `run`, or a new one."""
        raise NotImplementedError

    def send(self, handle: Any, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Hands over values of one kind: `scalars`, `images` or `texts`."""
        raise NotImplementedError

    def end(self, handle: Any) -> None:
        """Closes the run of the service."""

    # ---- the writer

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Curves by name."""
        self._put("scalars", step, {name: float(value) for name, value in scalars.items()})

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Images by name; the rows of a batch are images of their own, `name/0`, `name/1`, …"""
        rows: dict[str, Any] = {}
        for name, value in images.items():
            value = to_uint8(value)
            rows |= {name: value} if value.ndim == 3 else {f"{name}/{i}": row for i, row in enumerate(value)}
        self._put("images", step, rows)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Texts by name."""
        self._put("texts", step, {name: str(text) for name, text in texts.items()})

    def flush(self) -> None:
        """Nothing: the thread sends what there is."""

    def close(self) -> None:
        """Sends what waits, for at most `FAREWELL` seconds, and ends the run of the service."""
        if self._thread is None:
            return
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=FAREWELL)
        try:
            self._thread.result(timeout=FAREWELL)
        except TooSlow:
            logging.warning("%s did not take everything within %.0f s; the rest is left out.", self.NAME, FAREWELL)
        self._thread = None
        if self.lost:
            logging.info("%s lost %d entries; log.jsonl has them.", self.NAME, self.lost)
        self.lost = 0

    def _put(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if not self._active or not values:
            return
        if self._thread is None:
            self._thread = background.begin(self._work, self.NAME)
        try:
            self._queue.put_nowait((kind, int(step), values))
        except queue.Full:
            self.lost += 1

    # ---- the thread

    def _work(self) -> None:
        while (entry := self._queue.get()) is not None:
            self._guarded(entry)
        if self._handle is not None:
            with contextlib.suppress(Exception):
                self.end(self._handle)
            self._handle = None

    def _guarded(self, entry: tuple[str, int, dict[str, Any]]) -> None:
        if time.monotonic() < self._again:
            self.lost += 1
            return
        try:
            if self._handle is None:
                self._handle = self._opened()
            kind, step, values = entry
            self.send(self._handle, kind, step, values)
        except BaseException as error:  # a library that wants to exit does not end the run
            self.lost += 1
            self._again, self._handle = time.monotonic() + PAUSE, None
            if not self._warned:
                told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
                logging.warning("%s failed (%s); training goes on and this is said once.", self.NAME, told)
            self._warned = True

    def _opened(self) -> Any:
        """The handle of the run that `trackers.json` names, or of a new one, whose id it then has."""
        path = self.workdir / IDS
        try:
            ids = dict(read_json(path)) if path.exists() else {}
        except (ValueError, TypeError) as error:
            logging.warning("%s begins a new run, because %s", self.NAME, error)
            ids = {}
        known = ids.get(self.NAME)
        handle, run = self.open(known if isinstance(known, str) else None)
        if run != known:
            write_whole(path, (json.dumps(ids | {self.NAME: run}, indent=2) + "\n").encode())
        return handle


def tracker_classes(names: Sequence[str] | str) -> list[type[Tracker]]:
    """The classes that `log.trackers` names: files of `common/runtime/trackers`, or `package.module:Class`.

    Raises ValueError, in one sentence, for a name that is unknown or no tracker, or whose package is missing.
    """
    classes = []
    listed = (names,) if isinstance(names, str) else names
    for name in (word.strip() for each in listed for word in each.split(",") if word.strip()):
        try:
            found = lookup(FOLDER, name)
        except ValueError as error:
            raise ValueError(f"log.trackers: {error}") from error
        if not issubclass(found, Tracker):
            raise ValueError(f"log.trackers has {name!r}, which is no Tracker of src/common/runtime/tracker.py")
        found.check()
        classes.append(found)
    return classes
