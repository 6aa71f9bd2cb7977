"""Documents of texts and images.

The folder has `documents.jsonl` (or files of other names, in the order of these) with a line for each document,

    {"parts": [{"text": "A cat"}, {"image": "a/cat.png", "role": "generate"}, {"text": "sleeps.", "loss": false}]}

and the images, by paths below the folder. What else the folder holds, images that no document names too, is counted,
and a warning tells of it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

from src.data.example import BadRow, Example
from src.data.files.json_lines import JsonLines
from src.data.files.unnamed import warn_unnamed
from src.data.sources._files import FileSource, image_path
from src.data.told_once import tell_keys, tell_split


class Documents(FileSource):
    """`parts` of a document; `names` of the files, with `*`; `held_out` rows are "test"."""

    kind = "documents"

    def __init__(self, folder: str | os.PathLike[str], *, names: str = "documents.jsonl", held_out: int = 0):
        super().__init__(held_out)
        self.folder, self.names = folder, names

    def open(self) -> JsonLines:
        """The lines. Raises FileNotFoundError."""
        line = '{"parts": [{"text": "words"}, {"image": "a.png"}]} for each document'
        rows = JsonLines(self.path("folder"), [self.names], line)
        warn_unnamed(self.path("folder"), rows.paths, _images(rows))
        return rows

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return self.files.identity()

    def __getitem__(self, number: int) -> Example:
        line, where = self.files[number]
        parts = line.get("parts")
        tell_keys(line, where, ("parts",), "beside the parts")
        tell_split(line, where)
        if isinstance(parts, list):
            line["parts"] = [self._part(part, where) for part in parts]
        return Example(line, where)

    def _part(self, part: object, where: str) -> object:
        if not isinstance(part, dict) or "image" not in part:
            return part
        return part | {"image": image_path(self.path("folder"), part["image"], where)}


def _images(rows: JsonLines) -> Iterator[object]:
    """The paths of images that the documents name, as far as their lines can be read."""
    for number in range(len(rows)):
        try:
            parts = rows[number][0].get("parts")
        except BadRow:
            continue
        yield from (part.get("image") for part in parts if isinstance(part, dict)) if isinstance(parts, list) else ()
