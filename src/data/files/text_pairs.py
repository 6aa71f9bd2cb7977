"""Images of a folder, each with a text file of the same name beside it: `a/7.jpg` and `a/7.txt`."""

from __future__ import annotations

import os
from collections.abc import Iterator

from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import read_bounded
from src.common.files.store import is_remote
from src.data.example import BadRow
from src.data.files.json_lines import text_of
from src.data.files.left_out import is_system_file, is_system_folder, is_unusual

TEXT_BYTES = 1 << 20


class TextPairs:
    """The pairs of a folder and the folders in it, in the order of their names. An image without a text, and a text
    without an image, are bad rows; other files are none."""

    def __init__(self, folder: epath.Path):
        self._folder = folder
        names = sorted(_names(folder))
        self._texts = {os.path.splitext(name)[0]: name for name in names if name.lower().endswith(".txt")}
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


def _names(folder: epath.Path) -> Iterator[str]:
    """Paths of all files below a folder, without those that systems leave behind, and hidden ones."""
    if is_remote(folder):
        found = (os.path.relpath(path, folder) for path in folder.rglob("*"))
        yield from (name for name in found if not any(map(_is_left, name.split("/"))))
        return
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not _is_left(name)]
        yield from (os.path.relpath(os.path.join(place, name), folder) for name in files if not _is_left(name))


def _is_left(name: str) -> bool:
    return is_system_folder(name) or is_system_file(name) or is_unusual(name)
