"""JourneyDB (Sun et al. 2023): images with the prompt that made them and a caption.

`annotations` is a file with a line {"img_path": "./000/a.jpg", "prompt": "…", "Task2": {"Caption": "…"}} for each
image, or `*.json` with a list of these; `images` is the folder that the paths start from. An image that is missing is a
bad row, not its neighbour.
"""

from __future__ import annotations

import os

from src.data.example import Example
from src.data.files.json_lines import LineFile
from src.data.files.json_list import ListFile, open_rows
from src.data.sources._files import FileSource, image_path
from src.data.told_once import marks_of, tell_keys, tell_split

READ = ("img_path", "prompt", "Task1", "Task2", "Task3", "Task4")  # or other tasks of the data set


class JourneyDB(FileSource):
    """`image`, `prompt` and `caption`, as far as they are there, each a text or a list of several; `held_out` rows are
    "test"."""

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.annotations, self.images = annotations, images

    def open(self) -> LineFile | ListFile:
        """The lines, or the list. Raises FileNotFoundError, ValueError for a file of neither."""
        return open_rows(self.path("annotations"))

    def __getitem__(self, number: int) -> Example:
        where, line = self.files.where(number), self.files[number]
        tell_split(line, where)
        task2 = line.get("Task2")
        marks = ["caption"] * bool(line.get("caption")) + ["Task2"] * (not isinstance(task2, dict) and bool(task2))
        tell_keys(line, where, [key for key in READ if key not in marks], "beside the prompt", marks + marks_of(line))
        texts = {"prompt": line.get("prompt"), "caption": task2.get("Caption") if isinstance(task2, dict) else None}
        texts = {name: text for name, text in texts.items() if text is not None}
        return Example(texts | {"image": image_path(self.path("images"), line.get("img_path"), where)}, where)
