"""Image files with captions.

The folder holds `captions.jsonl` with a line {"image": "a/b.png", "caption": "two red pears"} for each row, and the
images, by paths below the folder. Broken lines, captions that are empty or no text, images that are missing, lie
outside the folder or cannot be decoded are bad rows (`BadRow`): named by their line, never replaced.
"""

from __future__ import annotations

import os

from src.data.example import Example
from src.data.files.json_lines import LineFile
from src.data.sources._files import FileSource, image_path

FILE = "captions.jsonl"


class Captions(FileSource):
    """`image` and the texts of a line, `caption` or others; `held_out` rows are "test"."""

    def __init__(self, folder: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.folder = folder

    def open(self) -> LineFile:
        """The lines. Raises FileNotFoundError if the folder has no such file."""
        path = self.path("folder") / FILE
        try:
            return LineFile(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{os.fspath(path)!r} does not exist: the folder needs a line"
                ' {"image": "a.png", "caption": "words"} for each image there'
            ) from error

    def __getitem__(self, number: int) -> Example:
        where, line = self.files.where(number), self.files[number]
        image = image_path(self.path("folder"), line.pop("image", None), where)
        texts = {name: text for name, text in line.items() if isinstance(text, str)}
        return Example(texts | {"image": image}, where)
