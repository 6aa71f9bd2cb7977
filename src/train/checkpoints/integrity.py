"""Damaged checkpoints: finds the damaged files, and moves damaged checkpoints aside.

A complete checkpoint gets `files.json`, the size of each of its files and a checksum of small ones. It only serves to
name files: whether a checkpoint is valid depends on its seal and fingerprints, so one without the list (in a store, or
if the process was killed before it) is read, too.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import pathlib
import re
import sys
import traceback
import warnings
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from absl import logging as absl_logging
from etils import epath

from src.common.files.paths import shown
from src.common.files.store import is_remote, move_folder, write_whole
from src.common.files.strict_json import read_json
from src.common.mesh.distributed import agree
from src.common.runtime.errors import brief, explain
from src.common.tree import listed

LIST = "files.json"
SMALL = 2**20  # bytes; larger files have no checksum, since they are not read again after writing
MARKER, COMMITTED = "_CHECKPOINT_METADATA", "commit_success.txt"
FIELDS = {  # of the marker; None and absent ones are allowed
    "item_handlers": dict | str, "metrics": dict, "performance_metrics": dict, "custom_metadata": dict,
    "init_timestamp_nsecs": int, "commit_timestamp_nsecs": int,
}  # fmt: skip
ARRAYS = "d"  # folders of pieces of arrays, which are read piece by piece
WHOLE = 256 << 20  # bytes; every other file is read whole
ORBAX = f"{os.sep}orbax{os.sep}"


class DamageError(Exception):
    """A damaged checkpoint, with the reason."""


def on_all_processes(item: str, action: Callable[[], Any]) -> Any:
    """The result of `action`. Raises DamageError on all processes when it fails on any of them."""
    result, reason = None, ""
    try:
        result = action()
    except Exception as error:
        reason = str(error) if isinstance(error, DamageError) else explain(error)
    if reason := agree(reason):
        raise DamageError(f"{item}: {reason}" if item else reason)
    return result


def shorten_orbax_errors() -> None:
    """Removes stack traces from the errors that Orbax logs and also raises (hundreds on a full disk), and Python's
    warnings about writes that Orbax then does not start, which would follow the error itself."""
    warnings.filterwarnings("ignore", r"coroutine 'async_serialize\S*' was never awaited", RuntimeWarning)
    if sys.unraisablehook is not _unraised:
        _before.append(sys.unraisablehook)
        sys.unraisablehook = _unraised
    for logger in (logging.getLogger("asyncio"), absl_logging.get_absl_logger()):
        if _shortened not in logger.filters:
            logger.addFilter(_shortened)


_before: list[Callable[[Any], Any]] = []


def _unraised(told: Any) -> None:
    # TensorStore's threads complete writes that Orbax cancelled after another one failed.
    if not (isinstance(told.exc_value, RuntimeError) and str(told.exc_value) == "Event loop is closed"):
        _before[-1](told)


def _shortened(record: logging.LogRecord) -> bool:
    if "exception was never retrieved" in record.msg:
        frames = traceback.walk_tb(record.exc_info[2]) if record.exc_info else ()
        if "orbax" in record.getMessage() or any(ORBAX in frame.f_code.co_filename for frame, _ in frames):
            return False  # Orbax raises another error of the same write
    if record.exc_info and ORBAX in record.pathname:
        record.exc_info = None
        record.msg, record.args = " ".join(record.getMessage().split())[:200].replace("%", "%%"), ()
    return True


# --------------------------------------------------------------------------- the files of a checkpoint


def check_marker(folder: epath.Path, items: Sequence[str]) -> None:
    """Raises DamageError if an item or the file that Orbax writes last is missing, or is not as Orbax writes it."""
    if missing := [item for item in items if not (folder / item).is_dir()]:
        raise DamageError(f"{missing[0]} is missing")
    try:
        marker = read_json(folder / MARKER)
    except FileNotFoundError:
        raise DamageError(f"{MARKER} is missing") from None
    except Exception as error:
        raise DamageError(f"{MARKER} cannot be read: {brief(error)}") from None
    if not isinstance(marker, dict):
        raise DamageError(f"{MARKER} holds {type(marker).__name__} instead of fields")
    for name, kind in FIELDS.items():
        if not isinstance(marker.get(name), kind | None) or isinstance(marker.get(name), bool):
            raise DamageError(f"{MARKER} has {name} = {shown(marker[name], 40)}, which Orbax does not write")
    handlers = marker.get("item_handlers") or {}
    if isinstance(handlers, dict) and not all(isinstance(each, str) for each in handlers.values()):
        raise DamageError(f"{MARKER} has item_handlers that Orbax does not write")
    if not marker.get("commit_timestamp_nsecs"):
        raise DamageError(f"{MARKER} says that the checkpoint is incomplete")
    marks = {place: (folder / place / COMMITTED).exists() for place in (".", *items)}  # older Orbax writes none
    if any(marks.values()) and not all(marks.values()):
        place = next(place for place, there in marks.items() if not there)
        raise DamageError(f"{COMMITTED if place == '.' else f'{place}/{COMMITTED}'} is missing")


def unmarked(directory: epath.Path, steps: Sequence[int], items: Sequence[str]) -> dict[int, str]:
    """Those of `steps` whose marker or items are damaged, with the reason; each is named in a warning, the same on
    every process. No other file is looked at."""
    found = {}
    for step in steps:
        folder = directory / str(step)
        try:
            on_all_processes("", lambda folder=folder: check_marker(folder, items))
        except DamageError as error:
            found[step] = str(error)
            absl_logging.warning("Checkpoint %s is damaged (%s); a newer one was read.", folder, error)
    return found


def check_plain(folder: epath.Path) -> None:
    """Raises DamageError for a device, a pipe or another thing that is no file, which a reader might never come back
    from, and for one of the files that are read whole that is larger than `WHOLE` bytes."""
    for place, _, names in () if is_remote(folder) else os.walk(folder):
        for path in (pathlib.Path(place, name) for name in names):
            name = path.relative_to(folder)
            if path.exists() and not path.is_file():
                raise DamageError(f"{name} is not a plain file")
            if path.parent.name != ARRAYS and path.is_file() and path.stat().st_size > WHOLE:
                raise DamageError(f"{name} has {path.stat().st_size:,} bytes, which no such file needs")


def write_file_list(folder: epath.Path) -> None:
    """Writes the list of the files of a new checkpoint; a failure is only logged."""
    if is_remote(folder):
        return
    try:
        write_whole(folder / LIST, json.dumps(_files(folder), indent=0).encode())
    except Exception as error:
        absl_logging.warning(
            "The file list of checkpoint %s was not written (%s); the checkpoint is complete.", folder, brief(error)
        )


def changed_files(folder: epath.Path) -> list[str]:
    """Differences between a checkpoint's files and its list, one phrase each."""
    try:
        noted = {name: (size, crc) for name, (size, crc) in read_json(folder / LIST).items()}
    except FileNotFoundError:
        noted = {}
    except Exception:
        return [f"{LIST} cannot be read"]
    try:
        now = _files(folder)
    except Exception:
        return []
    found = [f"{name} is empty" for name, (size, _) in now.items() if not size and name not in noted]
    for name, (size, crc) in noted.items():
        if name not in now:
            found.append(f"{name} is missing")
        elif now[name][0] != size:
            found.append(f"{name} has {now[name][0]} of {size} bytes")
        elif now[name][1] != crc:
            found.append(f"{name} has a wrong checksum")
    return found


def describe_damage(folder: epath.Path, error: BaseException) -> str:
    """The reason why a checkpoint is damaged, and its damaged files, if found."""
    files = changed_files(folder)
    if not files:
        files = sorted(set(re.findall(re.escape(f"{folder}/") + r"([^\s\"'\]:,]+)", str(error))))
    return f"{error}: {listed(files, 3)}" if files else str(error)


def _files(folder: epath.Path) -> dict[str, tuple[int, int | None]]:
    """(size in bytes, CRC-32 or None) of all files below a local folder, by relative path."""
    found = {}
    for place, _, names in os.walk(folder):
        for path in (pathlib.Path(place, name) for name in names if name != LIST):
            if not path.exists():  # a link to nowhere
                continue
            size = path.stat().st_size
            crc = zlib.crc32(path.read_bytes()) if path.is_file() and size <= SMALL else None
            found[str(path.relative_to(folder))] = (size, crc)
    return dict(sorted(found.items()))


# --------------------------------------------------------------------------- damaged checkpoints


def move_damaged(workdir: epath.Path, steps: Sequence[int]) -> None:
    """Moves checkpoints to `<workdir>/damaged/<step>-<number>`. Raises the errors of the file system."""
    for step in steps:
        place = next(p for i in itertools.count() if not (p := workdir / "damaged" / f"{step}-{i}").exists())
        move_folder(workdir / "checkpoints" / str(step), place)
        absl_logging.warning("Moved the damaged checkpoint of step %d to %s.", step, place)
