"""ImageNet, or any folder of images by class: `<folder>/<wnid>/*.JPEG`.

Classes are numbered by their folders' names, sorted; with `names` by the ids in that file, so that a part of ImageNet
keeps its numbers (`_classes.py` says what the file holds).
"""

from __future__ import annotations

import os

import numpy as np
from absl import logging
from etils import epath

from src.common.files.store import is_remote
from src.common.tree import listed
from src.data.example import Example
from src.data.files.index_cache import cached_table
from src.data.sources._classes import named_classes
from src.data.sources._files import FileSource

ENDINGS = (".jpeg", ".jpg", ".png", ".webp", ".gif", ".bmp")
NO_CLASSES = (".", "@", "__")  # how folders begin that systems leave behind, such as __MACOSX and @eaDir


class ImageFolders(FileSource):
    """`image` and `label`, sorted by class and name; other files are left out.

    names       a file that names the classes; without it folders that are words ("red_fox") name themselves
    ambiguous   what happens to names of two classes: `words` takes other words for those of ImageNet and refuses the
                rest, `keep` leaves them (as published)
    held_out    how many rows are "test", spread over the classes
    """

    kind = "classes"
    spread = True

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
        held_out: int = 0,
    ):
        super().__init__(held_out)
        self.folder, self.names, self.ambiguous = folder, names, ambiguous

    def open(self) -> _Images:
        """The images.

        Raises FileNotFoundError for a missing folder, ValueError for one without classes or images, names that lack a
        folder's class or are given twice.
        """
        return _Images(self.path("folder"), self.names, self.ambiguous)

    @property
    def classes(self) -> list[dict[str, str]]:
        """Id and name of each class."""
        return self.files.classes

    def __getitem__(self, number: int) -> Example:
        name, label = self.files[number]
        return Example({"image": self.path("folder") / name, "label": label}, name)


class _Images:
    """Name below the folder and class of each image."""

    def __init__(self, folder: epath.Path, names: str | os.PathLike[str], ambiguous: str):
        try:
            found = sorted(p.name for p in folder.iterdir() if not p.name.startswith(NO_CLASSES) and p.is_dir())
        except (FileNotFoundError, NotADirectoryError) as error:
            raise FileNotFoundError(f"{os.fspath(folder)!r} is no folder: give that of the classes' folders") from error
        if not found:
            raise ValueError(f"{os.fspath(folder)!r} should hold one folder for each class, and has none")
        self.classes = named_classes(found, names, ambiguous, whole=True)
        self._folders = found
        numbers = {c["id"]: number for number, c in enumerate(self.classes)}
        self._labels = np.array([numbers[name] for name in found])
        self._files = self._list(folder)
        if not len(self._files):
            raise ValueError(f"{os.fspath(folder)!r} has folders of classes and no image in them ({' '.join(ENDINGS)})")
        filled = set((self._files[:, 0] + 256 * self._files[:, 1].astype(int)).tolist())
        if empty := [name for place, name in enumerate(found) if place not in filled]:
            logging.warning("%s: no image in the folders of %d classes: %s", folder, len(empty), listed(empty))

    def _list(self, folder: epath.Path) -> np.ndarray:
        """Rows of bytes: number of the folder (2), name of the file, filled with zeros."""
        parts = [folder / name for name in self._folders]
        if is_remote(folder):
            return _listing(parts)
        key = [f"{os.path.abspath(part)}\0{os.stat(part).st_mtime_ns}" for part in parts]
        return cached_table("images", key, lambda: _listing(parts))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[str, int]:
        row = self._files[number].tobytes()
        part = int.from_bytes(row[:2], "little")
        return f"{self._folders[part]}/{os.fsdecode(row[2:].rstrip(bytes(1)))}", int(self._labels[part])


def _listing(parts: list[epath.Path]) -> np.ndarray:
    rows: list[bytes] = []
    for number, part in enumerate(parts):
        names = [p.name for p in part.iterdir()] if is_remote(part) else os.listdir(part)
        kept = sorted(os.fsencode(name) for name in names if name.lower().endswith(ENDINGS) and name[0] != ".")
        rows += [number.to_bytes(2, "little") + name for name in kept]
    width = max(map(len, rows), default=2)
    return np.frombuffer(b"".join(row.ljust(width, bytes(1)) for row in rows), np.uint8).reshape(len(rows), width)
