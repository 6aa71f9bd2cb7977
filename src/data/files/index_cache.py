"""Tables that are made once from large files and kept in the cache of this machine: where each example lies."""

from __future__ import annotations

import hashlib
import io
import os
import pathlib
import threading
import time
from collections.abc import Callable, Iterable

import numpy as np
from absl import logging

from src.common.files.npy import read_npy
from src.common.files.store import cache_folder, write_whole

VERSION = 8  # of what the tables mean
LONG = 5.0  # seconds that are worth a word
_LOCK = threading.Lock()


def cached_table(what: str, key: Iterable[str], make: Callable[[], np.ndarray]) -> np.ndarray:
    """The array that `make` gives, memory-mapped from the cache where it is there already.

    `key` says all that it depends on, with the sizes and times of change of files; another key is another table. A
    cache that cannot be read or written costs time and nothing else.
    """
    digest = hashlib.sha256(f"{VERSION}\0{what}".encode())
    for part in key:
        digest.update(b"\0" + part.encode(errors="surrogateescape"))
    path = pathlib.Path(cache_folder(), "tables", f"{what}-{digest.hexdigest()[:24]}.npy")
    with _LOCK:  # threads that open one source wait for the first
        try:
            return read_npy(path, mapped=True)
        except (OSError, ValueError):
            began = time.monotonic()
            table = make()
            if (seconds := time.monotonic() - began) > LONG:
                logging.info("looked through %s in %.0f s; the cache keeps what was found", what, seconds)
        data = io.BytesIO()
        np.save(data, table)
        try:
            write_whole(path, data.getvalue())
        except OSError:
            return table
        return table


def stamp(path: str | os.PathLike[str]) -> str:
    """A local file's or folder's path, size and times: another one when it is another, or has other files.

    Copies and archives give a file the time of change that it had elsewhere; `ctime` no program sets."""
    stat = os.stat(path)
    return f"{os.path.abspath(path)}\0{stat.st_size}\0{stat.st_mtime_ns}\0{stat.st_ctime_ns}"
