"""Images of a folder, each with a text file of the same name beside it: `a/7.jpg` and `a/7.txt`."""

from __future__ import annotations

import os

from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import read_bounded
from src.common.files.store import is_remote
from src.data.example import BadRow
from src.data.files.json_lines import text_of
from src.data.files.left_out import LeftOut, ending_of, is_system_file, is_system_folder, is_unusual

TEXT = ".txt"
TEXT_BYTES = 1 << 20


class TextPairs:
    """The pairs of a folder and the folders in it, in the order of their names. An image without a text, and a text
    without an image, are bad rows; other files are none and are counted in `left`."""

    def __init__(self, folder: epath.Path):
        self._folder, self.left = folder, LeftOut()
        names = [name for name in _names(folder, self.left) if _is_kept(name, self.left)]
        self._texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(TEXT)}
        images = [name for name in names if name.lower().endswith(ENDINGS)]
        alone = self._texts.keys() - {os.path.splitext(name)[0] for name in images}
        self.pairs = len(self._texts) - len(alone)
        self._names = sorted([*images, *(self._texts[stem] for stem in alone)])

    def __len__(self) -> int:
        return len(self._names)

    def where(self, number: int) -> str:
        """The file below the folder."""
        return self._names[number]

    def __getitem__(self, number: int) -> dict[str, str]:
        name = self._names[number]
        text = self._texts.get(os.path.splitext(name)[0])
        if text == name:
            raise BadRow("the image is missing", name, f"none of {' '.join(ENDINGS)} is beside it")
        if text is None:
            raise BadRow("there is no caption", name, "no .txt is beside it")
        try:
            data = read_bounded(self._folder / text, TEXT_BYTES, "caption")
        except (OSError, ValueError) as error:
            raise BadRow("the caption cannot be read", name, error) from error
        return {"image": name, "caption": text_of(data, text).strip()}


def _names(folder: epath.Path, left: LeftOut) -> list[str]:
    """Paths of all files below a folder, sorted, without those of the folders that are left out."""
    top, names = "", []

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
        below = lambda name, here=here: os.path.normpath(os.path.join(here, name))
        for name in folders:
            if os.path.islink(os.path.join(place, name)):
                left.add("links to folders", below(name))
            elif _is_closed(name) and not is_system_folder(name):
                left.add("folders whose names begin as those of systems do", below(name))
        folders[:] = [name for name in folders if not _is_closed(name)]
        names += map(below, files)
    return sorted(names)


def _is_closed(name: str) -> bool:
    """Whether a folder of this name is left out."""
    return is_system_folder(name) or (is_unusual(name) and name != ".")


def _is_kept(path: str, left: LeftOut) -> bool:
    """Whether a file is an image or a text."""
    name = os.path.basename(path)
    if is_system_file(name):
        return False
    kept = name.lower().endswith((*ENDINGS, TEXT)) and not name.startswith(".")
    if not kept:
        left.add(f"{ending_of(name)}{' (hidden)' * name.startswith('.')}", path)
    return kept
