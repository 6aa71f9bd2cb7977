"""ImageNet, or any folder of images by class: `<folder>/<wnid>/*.JPEG`.

Classes are numbered by their folders' names, sorted; with `names` by the ids in that file, so that a part of ImageNet
keeps its numbers (`_classes.py` says what the file holds).
"""

from __future__ import annotations

import os

import numpy as np
from absl import logging
from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import shown
from src.common.files.store import identity, is_remote
from src.common.tree import listed
from src.data.example import Example
from src.data.files.index_cache import stamp
from src.data.files.left_out import LeftOut, cached_listing, is_system_file, is_system_folder, is_unusual, kind_of_file
from src.data.sources._classes import named_classes, read_names
from src.data.sources._files import FileSource
from src.data.told_once import TESTS

NUMBER = 3  # bytes of a class's number
TRAIN = ("train", "training")


class ImageFolders(FileSource):
    """`image` and `label`, sorted by class and name. Other files are left out, and a warning has their number by
    ending; folders that systems leave behind (`@eaDir`, `lost+found`) are no classes.

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
        found, left = _folders(folder, names)
        self.classes = named_classes(found, names, ambiguous, whole=True)
        self._folders = found
        numbers = {c["id"]: number for number, c in enumerate(self.classes)}
        self._labels = np.array([numbers[name] for name in found])
        self._files, inside = self._list(folder)
        left.update(inside)
        if not len(self._files):
            raise ValueError(
                f"{os.fspath(folder)!r} has folders of classes and no image in them ({' '.join(ENDINGS)})"
                + (f"; they have {left}" if left else "")
            )
        left.warn(folder)
        _warn_same(folder, found)
        _warn_odd(folder, [] if os.fspath(names) else found, [c["id"] for c in self.classes])
        filled = set(map(bytes, self._files[:, :NUMBER]))
        if empty := [name for place, name in enumerate(found) if place.to_bytes(NUMBER, "little") not in filled]:
            told = "%s: no image in the folders of %d classes, which keep their numbers: %s"
            logging.warning(told, folder, len(empty), listed(empty))

    def _list(self, folder: epath.Path) -> tuple[np.ndarray, LeftOut]:
        """Rows of bytes: number of the folder (3), name of the file, filled with zeros."""
        parts = [folder / name for name in self._folders]
        if is_remote(folder):
            return _listing(parts)
        return cached_listing("images", map(stamp, parts), lambda: _listing(parts))

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> tuple[str, int]:
        row = self._files[number].tobytes()
        part = int.from_bytes(row[:NUMBER], "little")
        return f"{self._folders[part]}/{os.fsdecode(row[NUMBER:].rstrip(bytes(1)))}", int(self._labels[part])


def _folders(folder: epath.Path, names: str | os.PathLike[str]) -> tuple[list[str], LeftOut]:
    """The folders of the classes, and the files beside them but for that of the names. Raises FileNotFoundError,
    ValueError."""
    named = read_names(names) if os.fspath(names) else {}
    names = epath.Path(names)
    try:
        entries = [(p.name, p.is_dir()) for p in folder.iterdir()]
    except (FileNotFoundError, NotADirectoryError) as error:
        raise FileNotFoundError(f"{os.fspath(folder)!r} is no folder: give that of the classes' folders") from error
    folders = sorted(name for name, is_folder in entries if is_folder)
    classes = [name for name in folders if name in named or not (is_system_folder(name) or is_unusual(name))]
    left, here = LeftOut(), LeftOut()
    for name, is_folder in sorted(entries):
        if not is_folder and not is_system_file(name) and folder / name != names:
            here.add(kind_of_file(name), name)
            what = "images" if name.lower().endswith(ENDINGS) else kind_of_file(name)
            left.add(f"{what} beside the folders of the classes", name)
    if not classes:
        told = f": it has {here}" if here else ""
        raise ValueError(f"{os.fspath(folder)!r} should hold one folder for each class, and has none{told}")
    if other := sorted(set(folders) - set(classes)):
        told = "%s: folders that are no classes: %s (a file of names can make classes of them)"
        logging.log(logging.INFO if all(map(is_system_folder, other)) else logging.WARNING, told, folder, listed(other))
    return classes, left


def _warn_same(folder: epath.Path, classes: list[str]) -> None:
    """Tells of folders of classes that are one folder, by links: each of its images has several labels."""
    names: dict[object, list[str]] = {}
    for name in classes if not is_remote(folder) else ():
        names.setdefault(identity(folder / name), []).append(name)
    if same := [" = ".join(alike) for alike in names.values() if len(alike) > 1]:
        logging.warning("%s: folders of classes that are the same folder: %s", folder, listed(same))


def _warn_odd(folder: epath.Path, unnamed: list[str], ids: list[str]) -> None:
    """Tells of folders of classes that no file names and that are called as splits are, and of ids that are numbers and
    are not in their order."""
    if splits := [name for name in unnamed if name.lower() in TRAIN or TESTS.fullmatch(name.lower())]:
        told = "%s: folders that are called as splits are classes like the others: %s; give the folder of one split"
        logging.warning(told, folder, listed(splits))
    if all(map(str.isdecimal, ids)) and (wrong := [n for n in range(1, len(ids)) if int(ids[n]) < int(ids[n - 1])]):
        told = "%s: classes are sorted as texts: %s is the class %d; write numbers with as many digits (02, 10)"
        logging.warning(told, folder, shown(ids[wrong[0]]), wrong[0])


def _listing(parts: list[epath.Path]) -> tuple[np.ndarray, LeftOut]:
    rows: list[bytes] = []
    left = LeftOut()
    for number, part in enumerate(parts):
        kept = []
        for name, is_folder in sorted(_entries(part)):
            if is_system_folder(name):
                continue
            if is_folder:
                left.add("folders inside those of the classes", f"{part.name}/{name}")
            elif name.lower().endswith(ENDINGS) and name[0] != ".":
                kept.append(os.fsencode(name))
            elif not is_system_file(name):
                left.add(kind_of_file(name), f"{part.name}/{name}")
        rows += [number.to_bytes(NUMBER, "little") + name for name in sorted(kept)]
    width = max(map(len, rows), default=NUMBER)
    return np.frombuffer(b"".join(row.ljust(width, bytes(1)) for row in rows), np.uint8).reshape(len(rows), width), left


def _entries(folder: epath.Path) -> list[tuple[str, bool]]:
    """The names in a folder, and whether they are folders; a store is not asked for every one."""
    if is_remote(folder):
        return [(p.name, False) for p in folder.iterdir()]
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir()) for entry in entries]
