"""Files that a source leaves out: those that systems leave behind, which nobody misses, and others, which are counted
by what they are and told at every start."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
from absl import logging
from etils import epath

from src.common.files.paths import shown
from src.common.files.store import is_remote
from src.data.files.index_cache import cached_table
from src.data.told_once import is_for_tests

KINDS = 12  # that a message names
# Names in small letters; other names that begin as these do (hidden ones, @tmp, #recycle) are `unusual`.
SYSTEM_FILES = (".ds_store", ".directory", ".localized", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")
SYSTEM_FOLDERS = (
    *("__macosx", "__pycache__", ".ipynb_checkpoints", "lost+found", "system volume information", "$recycle.bin"),
    *("recycler", "recycled", "found.000", "@eadir", "@recycle", "@recently-snapshot", "@tmp", "@__thumb", "#recycle"),
    *("#snapshot", "temporary items", "network trash folder", "thevolumesettingsfolder"),
)
UNUSUAL = (".", "@", "#", "$", "__")


def is_system_file(name: str) -> bool:
    """Whether a system leaves a file of this name behind, such as `.DS_Store` or `._1.jpg`."""
    return name.startswith("._") or name.lower() in SYSTEM_FILES


def is_system_folder(name: str) -> bool:
    """Whether a system leaves a folder of this name behind, such as `__MACOSX`, `@eaDir` or `lost+found`."""
    return name.lower() in SYSTEM_FOLDERS


def is_unusual(name: str) -> bool:
    """Whether a folder's name begins as those that systems leave behind do."""
    return name.startswith(UNUSUAL)


def ending_of(name: str) -> str:
    """What a message calls the kind of a file."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def kind_of_file(name: str) -> str:
    """What a message calls a file: its ending, and whether it is hidden."""
    return ending_of(name) + " (hidden)" * name.startswith(".")


class LeftOut:
    """Files that are left out, by what they are: how many, and the first one."""

    def __init__(self, found: dict[str, tuple[int, str]] | None = None):
        self._found = found or {}

    def add(self, what: str, name: str, count: int = 1) -> None:
        """Counts files; `name` is the first of them."""
        before, first = self._found.get(what, (0, name))
        self._found[what] = before + count, first

    def update(self, other: LeftOut) -> None:
        """Adds what another one has counted."""
        for what, (count, name) in other._found.items():
            self.add(what, name, count)

    def __str__(self) -> str:
        most = sorted(self._found.items(), key=lambda item: -item[1][0])
        told = [f"{count} {what} (such as {shown(name)})" for what, (count, name) in most[:KINDS]]
        return ", ".join(told) + (f", and {len(most) - KINDS} other kinds" if len(most) > KINDS else "")

    def __bool__(self) -> bool:
        return bool(self._found)

    def warn(self, where: str | os.PathLike[str]) -> None:
        """Tells of them; the workers of a run have nothing to add to what it said."""
        if self and multiprocessing.parent_process() is None:
            total = sum(count for count, _ in self._found.values())
            logging.warning("%s: %d files are left out: %s", os.fspath(where), total, self)

    def pack(self) -> np.ndarray:
        """As uint8 `[bytes]`, for the cache."""
        return np.frombuffer(json.dumps(self._found).encode(), np.uint8)

    @classmethod
    def unpack(cls, data: np.ndarray) -> LeftOut:
        """What `pack` gave."""
        return cls({what: (count, name) for what, (count, name) in json.loads(data.tobytes()).items()})


def warn_tests(where: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Tells of files that are named for tests (`test.jsonl`, `val/1.png`) and are read like others that are not."""
    if tests := [name for name in names if is_for_tests(name)]:
        tell_tests(where, len(tests), len(names), tests[0])


def tell_tests(where: str | os.PathLike[str], count: int, total: int, first: str, what: str = "files") -> None:
    """The warning of `warn_tests` about `count` of `total`, unless all are for tests."""
    if 0 < count < total and multiprocessing.parent_process() is None:
        told = "%s: %d of %d %s that are read are named for tests, such as %s: put them elsewhere, or see held_out"
        logging.warning(told, os.fspath(where), count, total, what, shown(first))


def warn_beside(folder: epath.Path, read: Collection[str]) -> None:
    """Tells what a local or remote folder holds besides the files `read`, which have their names there."""
    if multiprocessing.parent_process() is not None:
        return
    left = LeftOut()
    for path in sorted(folder.iterdir(), key=lambda path: path.name):
        name = path.name
        if name not in read and not is_system_file(name) and not is_system_folder(name):
            is_folder = not is_remote(path) and path.is_dir()
            left.add("folders" if is_folder else kind_of_file(name), name)
    left.warn(folder)


def cached_listing(
    what: str, key: Iterable[str], make: Callable[[], tuple[np.ndarray, LeftOut]]
) -> tuple[np.ndarray, LeftOut]:
    """The table that `make` gives and what it left out, both kept as `cached_table` does."""
    key, made = list(key), []

    def once() -> list:
        if not made:
            made.extend(make())
        return made

    table = cached_table(what, key, lambda: once()[0])
    return table, LeftOut.unpack(cached_table(f"{what}-left", key, lambda: once()[1].pack()))
