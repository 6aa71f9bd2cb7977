"""LLaVA-1.5's instruction data (Liu et al. 2023): chats about images, a JSON list.

An element of the list is {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "…"}, …]}; those without "image" are text alone. Chats in the other forms of `_chats.py` are
read, too, and files `*.jsonl` with such an object on each line.
"""

from __future__ import annotations

import os

from src.data.example import Example, turns_of
from src.data.files.json_lines import LineFile
from src.data.files.json_list import ListFile
from src.data.sources._chats import read_turns, tell_marker
from src.data.sources._files import FileSource, image_path


class Llava(FileSource):
    """`turns`, and `image` where there is one; `images` is the folder that the paths start from; `held_out` rows are
    "test"."""

    kind = "chats"

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.annotations, self.images = annotations, images

    def open(self) -> ListFile | LineFile:
        """The list, or the lines. Raises FileNotFoundError, and ValueError for a list that is none."""
        self.path("images")
        path = self.path("annotations")
        return LineFile(path, lists=True) if path.suffix.lower() == ".jsonl" else ListFile(path)

    def __getitem__(self, number: int) -> Example:
        where, element = self.files.where(number), self.files[number]
        example = Example({"turns": read_turns(element, where, known=("image",))}, where)
        turns_of(example)
        name = element.get("image")
        if name is None:
            tell_marker(example["turns"], where)
        else:
            example["image"] = image_path(self.path("images"), name, where)
        return example
