"""Images of a folder that none of a source's rows names, which nobody would miss otherwise."""

from __future__ import annotations

import hashlib
import itertools
import multiprocessing
import os
import posixpath
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging
from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import shown
from src.common.files.store import is_remote, local_copy
from src.common.mesh.distributed import is_first
from src.common.tree import listed
from src.data.files.folder_walk import files_below
from src.data.files.index_cache import cached_table, stamp
from src.data.files.left_out import LeftOut, is_system_file, kind_of_file

BYTES = 1 << 25  # of the rows: to read the names in larger files takes more than some seconds
KEPT = 1 << 20  # bytes from which on the cache keeps the names
FILES, REMOTE_FILES = 1 << 19, 1 << 16  # that are looked at
SHOWN = 3


def warn_unnamed(folder: epath.Path, rows: Sequence[epath.Path], names: Iterable[object]) -> None:
    """Tells how many images below a folder the files `rows`, which lie there, do not name, and what else it holds.

    names   paths of images that rows name, which may be read late or not at all; what is no text is none

    The first process of a run looks and the others have nothing to add. The cache keeps the names of long files. Files
    of more than `BYTES`, and folders of more than `FILES`, are not compared to the end, which the log tells.
    """
    if multiprocessing.parent_process() is not None or not is_first():
        return
    files = listed([shown(path.name) for path in rows], SHOWN)
    size = sum(path.stat().length for path in rows)
    if size > BYTES:
        told = "%s: its images are not compared with %s, which has more than %d MiB"
        logging.info(told, os.fspath(folder), files, BYTES >> 20)
        return
    make = lambda: _digests(names)
    stamps = [stamp(local_copy(path)) for path in rows]
    known = set((cached_table("named", stamps, make) if size > KEPT else make()).tolist())
    own, left, missing = {os.path.relpath(path, folder) for path in rows}, LeftOut(), list[str]()
    is_named = lambda path: _digest(path) in known
    count = seen = 0
    limit = REMOTE_FILES if is_remote(folder) else FILES
    for path in itertools.islice(files_below(folder, left, is_named), limit):
        name, seen = os.path.basename(path), seen + 1
        is_image = name.lower().endswith(ENDINGS) and not name.startswith(".")
        count += is_image
        if path in own or is_system_file(name) or is_named(path):
            continue
        if is_image:
            missing.append(path)
        else:
            left.add(kind_of_file(name), path)
    if missing:
        first = ", ".join(map(shown, missing[:SHOWN]))
        told = "%s: %d of %d images are not named in %s, such as %s"
        logging.warning(told, os.fspath(folder), len(missing), count, files, first)
    if seen == limit:
        logging.info("%s: only the first %d files are compared with %s", os.fspath(folder), limit, files)
    left.warn(folder)


def _digest(path: str) -> int:
    return int.from_bytes(hashlib.blake2b(os.fsencode(path), digest_size=8).digest(), "little")


def _digests(names: Iterable[object]) -> np.ndarray:
    """64 bits of each name and of the folders above it, sorted: uint64 [n]."""
    found: set[int] = set()
    folders: set[str] = set()
    for name in names:
        try:
            path = posixpath.normpath(name)
            found.add(_digest(path))
        except (TypeError, UnicodeEncodeError):  # no text, or half a surrogate pair, which no file has
            continue
        while (path := posixpath.dirname(path)).strip("/") and path not in folders:
            folders.add(path)
            found.add(_digest(path))
    return np.array(sorted(found), np.uint64)
