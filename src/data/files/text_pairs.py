"""Images of a folder, each with a text file of the same name beside it: `a/7.jpg` and `a/7.txt`."""

from __future__ import annotations

import os

from etils import epath

from src.common.files.images import ENDINGS
from src.common.files.paths import inside, read_bounded
from src.data.example import BadRow
from src.data.files.folder_walk import files_below
from src.data.files.json_lines import caption_of
from src.data.files.left_out import LeftOut, is_system_file, kind_of_file

TEXT = ".txt"
TEXT_BYTES = 1 << 20


class TextPairs:
    """The pairs of a folder and the folders in it, in the order of their names. An image without a text, and a text
    without an image, are bad rows; other files are none and are counted in `left`. `folders` has that of each file."""

    def __init__(self, folder: epath.Path):
        self._folder, self.left = folder, LeftOut()
        names = [name for name in sorted(files_below(folder, self.left)) if _is_kept(name, self.left)]
        self._texts: dict[str, str] = {}
        for name in (name for name in names if name.lower().endswith(TEXT)):
            if before := self._texts.get(os.path.splitext(name)[0]):  # in capitals
                self.left.add("second texts of an image", before)
            self._texts[os.path.splitext(name)[0]] = name
        images = [name for name in names if name.lower().endswith(ENDINGS)]
        alone = self._texts.keys() - {os.path.splitext(name)[0] for name in images}
        self.pairs = len(self._texts) - len(alone)
        self.folders = [os.path.dirname(name) for name in names]
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
            data = read_bounded(inside(self._folder, text), TEXT_BYTES, "caption")
        except (OSError, ValueError) as error:
            raise BadRow("the caption cannot be read", name, error) from error
        return {"image": name, "caption": caption_of(data, text)}


def _is_kept(path: str, left: LeftOut) -> bool:
    """Whether a file is an image or a text."""
    name = os.path.basename(path)
    if is_system_file(name):
        return False
    kept = name.lower().endswith((*ENDINGS, TEXT)) and not name.startswith(".")
    if not kept:
        left.add(kind_of_file(name), path)
    return kept
