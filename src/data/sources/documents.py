"""Documents of texts and images.

The folder has `documents.jsonl` (or files of other names, in the order of these) with a line for each document,

    {"parts": [{"text": "A cat"}, {"image": "a/cat.png", "role": "generate"}, {"text": "sleeps.", "loss": false}]}

and the images, by paths below the folder.
"""

from __future__ import annotations

import os

from src.data.example import Example
from src.data.files.json_lines import JsonLines
from src.data.sources._files import FileSource, image_path


class Documents(FileSource):
    """`parts` of a document; `names` of the files, with `*`; `held_out` rows are "test"."""

    kind = "documents"

    def __init__(self, folder: str | os.PathLike[str], *, names: str = "documents.jsonl", held_out: int = 0):
        super().__init__(held_out)
        self.folder, self.names = folder, names

    def open(self) -> JsonLines:
        """The lines. Raises FileNotFoundError."""
        line = '{"parts": [{"text": "words"}, {"image": "a.png"}]} for each document'
        return JsonLines(self.path("folder"), [self.names], line)

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return self.files.identity()

    def __getitem__(self, number: int) -> Example:
        line, where = self.files[number]
        parts = line.get("parts")
        if isinstance(parts, list):
            line["parts"] = [self._part(part, where) for part in parts]
        return Example(line, where)

    def _part(self, part: object, where: str) -> object:
        if not isinstance(part, dict) or "image" not in part:
            return part
        return part | {"image": image_path(self.path("folder"), part["image"], where)}
