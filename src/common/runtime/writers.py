"""Writers of the scalars, images and texts of a run. Only process 0 writes, and a writer that fails never stops a run.

A run that resumes from a checkpoint removes what a killed one had logged of later steps (`History`).

In a store (`gs://`), which cannot append, files are written locally and sent whole: at the first flush, then about once
a minute, and at close; `JsonLinesWriter` before every checkpoint, too. What a killed process had not sent is lost.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from absl import logging

from src.common.files.paths import bounded_lines, check_plain
from src.common.files.store import SEND_SHARE, Mirror, identity, is_remote, write_whole

SLOW = 1.0  # seconds of a failed attempt after which the next one waits


@runtime_checkable
class MetricWriter(Protocol):
    """Every method takes the step and values by name; `images` are `[H, W, C]` or `[B, H, W, C]`, uint8 or in 0 … 1."""

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None: ...

    def write_images(self, step: int, images: Mapping[str, Any]) -> None: ...

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


@runtime_checkable
class History(Protocol):
    """A writer with a history, so that the log of a resumed run is that of an uninterrupted one."""

    def rewind(self, step: int, again: tuple[str, ...] = ()) -> None:
        """Removes what was logged of the steps after `step`.

        Names of `step` itself that begin with one of `again` are about to be logged again.
        """
        ...

    def settle(self) -> None:
        """Returns when what was logged so far survives a kill of this process, as far as that is cheap."""
        ...


class _Guarded:
    """Opens late and writes on process 0 only. What fails never stops a run: it is counted and warned of once.

    After a failure the file is opened again at the next write, or later where the attempt took long, so that a disk
    that hangs does not delay every line. A file that was removed or replaced is made again.
    """

    def __init__(self, target: str | os.PathLike[str]):
        self.target = os.fspath(target)
        self.lost = 0  # writes
        self._active = jax.process_index() == 0
        self._warned = False
        self._again, self._identity = 0.0, None
        self._handle: Any = None
        self._mirror: Mirror | None = None

    def _folder(self, folder: str) -> str:
        """The local folder to write in."""
        if is_remote(folder):
            self._mirror = self._mirror or Mirror(folder)
            return str(self._mirror.folder)
        os.makedirs(folder or ".", exist_ok=True)
        return folder

    def _open(self) -> Any:
        raise NotImplementedError

    def _guard(self, action: Callable[[Any], None], opening: bool = True, sending: bool = False) -> None:
        if not self._active or (self._handle is None and not opening):
            return
        began = time.monotonic()
        if opening and began < self._again:
            self.lost += 1
            return
        try:
            if self._handle is not None and opening and self._is_gone():
                self._drop()
            if self._handle is None:
                self._handle = self._open()
                self._identity = identity(self._path(self._handle))
            action(self._handle)
        except Exception as error:
            if not sending:  # what could not be sent is sent later
                self.lost += 1
                took = time.monotonic() - began
                self._again = time.monotonic() + (took / SEND_SHARE if took > SLOW else 0)
                self._drop()
            if not self._warned:
                logging.warning(
                    "%s cannot write to %s (%s: %s); training goes on and this is said once.",
                    type(self).__name__, self.target, type(error).__name__, error,
                )  # fmt: skip
            self._warned = True

    def _is_gone(self) -> bool:
        """Whether the open file is no longer the one of its name."""
        return identity(self._path(self._handle)) != self._identity

    def _path(self, handle: Any) -> str:
        """Where the file is that `_open` gave."""
        raise NotImplementedError

    def _drop(self) -> None:
        handle, self._handle = self._handle, None
        with contextlib.suppress(Exception):  # it may hold what it could not write
            if handle is not None:
                handle.close()

    def flush(self) -> None:
        """Hands what was written to the operating system, or to a store when it is time to."""
        self._guard(lambda handle: handle.flush(), opening=False)
        self._guard(lambda _: self._mirror and self._mirror.send(), opening=False, sending=True)

    def close(self) -> None:
        """Flushes and releases the file; a later write opens it again."""
        self._guard(lambda handle: handle.close(), opening=False)
        self._guard(lambda _: self._mirror and self._mirror.close(), opening=False, sending=True)
        self._handle = self._mirror = None
        if self.lost:
            logging.info("%s lost %d writes to %s.", type(self).__name__, self.lost, self.target)
        self.lost = 0


class JsonLinesWriter(_Guarded):
    """Appends `{"step": 3, "time": …, "loss": 0.5}` lines to a file; images are left out.

    A value that is not finite is written as text ("nan"), so that every line is valid JSON.
    """

    def _open(self) -> Any:
        folder, name = os.path.split(self.target)
        path = os.path.join(self._folder(folder), name)
        if self._mirror and not os.path.exists(path):
            self._mirror.fetch(name)  # a resumed run continues the same file
        check_plain(path)
        handle = open(path, "a+b")  # noqa: SIM115 - it stays open for the run
        if handle.tell() > 0:
            handle.seek(-1, os.SEEK_END)
            if handle.read(1) != b"\n":  # a killed run left half a line
                handle.write(b"\n")
        return handle

    def _path(self, handle: Any) -> str:
        return handle.name

    def _line(self, step: int, values: Mapping[str, Any]) -> None:
        if not values:
            return
        record = {"step": int(step), "time": round(time.time(), 3), **values}
        self._guard(lambda handle: handle.write((json.dumps(record, allow_nan=False) + "\n").encode()))
        self.flush()

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One line with all scalars of the step."""
        numbers = {name: float(value) for name, value in scalars.items()}
        self._line(step, {name: x if math.isfinite(x) else str(x) for name, x in numbers.items()})

    def rewind(self, step: int, again: tuple[str, ...] = ()) -> None:
        """Takes lines back (see `History`), and the half line that a killed run left."""

        def action(handle: Any) -> None:
            if all(_stays(line, step, again) for line in bounded_lines(handle)):
                return
            write_whole(handle.name, (line for line in bounded_lines(handle) if _stays(line, step, again)))
            handle.close()
            self._handle = open(handle.name, "a+b")  # noqa: SIM115 - it stays open for the run

        self._guard(action)

    def settle(self) -> None:
        """Sends the file, where it is one of a store."""
        self._guard(lambda handle: handle.flush(), opening=False)
        self._guard(lambda _: self._mirror and self._mirror.send(now=True), opening=False, sending=True)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Nothing: a text file has no images."""

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """One line with all texts of the step."""
        self._line(step, {name: str(text) for name, text in texts.items()})


class TensorBoard(_Guarded):
    """Event files for TensorBoard in a folder, written in the calling thread through tensorboardX's records.

    Its SummaryWriter hands events to a thread over a bounded queue, which blocks for ever once that thread died of a
    full disk; a plain write fails visibly instead.
    """

    def _open(self) -> Any:
        from tensorboardX.event_file_writer import EventsWriter  # lazily: 0.4 s

        return EventsWriter(os.path.join(self._folder(self.target), "events"), f".{os.getpid()}")

    def _path(self, handle: Any) -> str:
        return handle._file_name

    def _write(self, step: int, values: Mapping[str, Any], summarize: Callable[[str, Any], Any]) -> None:
        def action(handle: Any) -> None:
            from tensorboardX.proto.event_pb2 import Event

            for name, value in values.items():
                handle.write_event(Event(wall_time=time.time(), step=int(step), summary=summarize(name, value)))

        if values:
            self._guard(action)
        if self._mirror:
            self.flush()

    def rewind(self, step: int, again: tuple[str, ...] = ()) -> None:
        """Has TensorBoard leave out what the files of earlier processes hold of later steps.

        It does so when it meets the start of a session. What is logged `again` is there twice, alike.
        """

        def action(handle: Any) -> None:
            from tensorboardX.proto.event_pb2 import Event, SessionLog

            start = SessionLog(status=SessionLog.START)
            handle.write_event(Event(wall_time=time.time(), step=int(step) + 1, session_log=start))

        self._guard(action)

    def settle(self) -> None:
        """Flushes to the operating system; images are too large to be sent to a store at every checkpoint."""
        self._guard(lambda handle: handle.flush(), opening=False)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """One curve for each name."""

        def summarize(name: str, value: Any) -> Any:
            from tensorboardX.summary import scalar

            return scalar(name, float(value))

        self._write(step, scalars, summarize)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """One image for each name and row, `name/0`, `name/1`, …"""
        rows: dict[str, np.ndarray] = {}
        for name, value in images.items():
            value = to_uint8(value)
            rows |= {name: value} if value.ndim == 3 else {f"{name}/{i}": row for i, row in enumerate(value)}

        def summarize(name: str, value: Any) -> Any:
            from tensorboardX.summary import image

            return image(name, value, dataformats="HWC")

        self._write(step, rows, summarize)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """One text (Markdown) for each name."""

        def summarize(name: str, value: Any) -> Any:
            from tensorboardX.summary import text

            return text(name, str(value))

        self._write(step, texts, summarize)


class Many:
    """Several writers as one."""

    def __init__(self, writers: Sequence[MetricWriter]):
        self.writers = tuple(writers)

    def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
        """Passes the scalars on, fetched from the device once."""
        scalars = jax.device_get(dict(scalars))
        for writer in self.writers:
            writer.write_scalars(step, scalars)

    def write_images(self, step: int, images: Mapping[str, Any]) -> None:
        """Passes the images on, fetched from the device once."""
        images = jax.device_get(dict(images))
        for writer in self.writers:
            writer.write_images(step, images)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Passes the texts on."""
        for writer in self.writers:
            writer.write_texts(step, texts)

    def rewind(self, step: int, again: tuple[str, ...] = ()) -> None:
        """Rewinds every writer that can."""
        for writer in self.writers:
            if isinstance(writer, History):
                writer.rewind(step, again)

    def settle(self) -> None:
        """Settles every writer that can."""
        for writer in self.writers:
            if isinstance(writer, History):
                writer.settle()

    def flush(self) -> None:
        """Flushes every writer."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Closes every writer."""
        for writer in self.writers:
            writer.close()


def _stays(line: bytes, step: int, again: tuple[str, ...]) -> bool:
    """Whether a line of a log is whole and of no later step, and will not come again."""
    try:
        record = json.loads(line)
        told = record["step"]
        redone = told == step and any(name.startswith(again) for name in record)
        return line.endswith(b"\n") and told <= step and not redone
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def to_uint8(value: Any) -> np.ndarray:
    """An image or a batch of them, of uint8 or in 0 … 1, as uint8. Raises ValueError for another shape."""
    value = np.asarray(value)
    if value.ndim not in (3, 4):
        raise ValueError(f"an image has the shape [H, W, C] or [B, H, W, C], not {value.shape}")
    if value.dtype == np.uint8:
        return value
    value = np.nan_to_num(value.astype(np.float32))
    return np.round(np.clip(value, 0.0, 1.0) * 255).astype(np.uint8)
