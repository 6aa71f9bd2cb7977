"""The files below a folder, without those of the folders that a source leaves out."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from etils import epath

from src.common.files.store import is_remote
from src.data.files.left_out import LeftOut, is_system_folder, is_unusual


def files_below(
    folder: epath.Path, left: LeftOut, is_read: Callable[[str], bool] = lambda name: False
) -> Iterator[str]:
    """Paths of all files below a local or remote folder, folder by folder, each in the order of its names.

    Links to folders, and folders whose names begin as those that systems leave behind do, are not opened; they are
    counted in `left` unless `is_read` knows their path. A folder that is not there has no files.
    """
    top = ""

    def unreadable(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            left.add("folders that cannot be read", os.fspath(error.filename or folder))

    walk = folder.walk(on_error=unreadable) if is_remote(folder) else os.walk(folder, onerror=unreadable)
    for place, folders, files in walk:
        place = os.fspath(place)
        top = top or place  # a store's client may leave out how addresses begin
        here = os.path.relpath(place, top)
        if any(map(_is_closed, here.split("/"))):
            continue  # not every client lets `folders` be shortened
        prefix = "" if here == "." else f"{here}/"
        for name in folders:
            if is_read(prefix + name):
                continue
            if os.path.islink(os.path.join(place, name)):
                left.add("links to folders", prefix + name)
            elif _is_closed(name) and not is_system_folder(name):
                left.add("folders whose names begin as those of systems do", prefix + name)
        folders[:] = sorted(name for name in folders if not _is_closed(name))
        yield from (prefix + name for name in sorted(files))


def _is_closed(name: str) -> bool:
    """Whether a folder of this name is left out."""
    return is_system_folder(name) or (is_unusual(name) and name != ".")
