"""LLaVA-1.5's instruction data (Liu et al. 2023): chats about images, a JSON list.

An element of the list is {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "…"}, …]}; those without "image" are text alone.
"""

from __future__ import annotations

import os
from typing import Any

from src.data.example import BadRow, Example, turns_of
from src.data.files.json_list import ListFile
from src.data.sources._files import FileSource, image_path

ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


class Llava(FileSource):
    """`turns`, and `image` where there is one; `images` is the folder that the paths start from; `held_out` rows are
    "test"."""

    kind = "chats"

    def __init__(self, annotations: str | os.PathLike[str], images: str | os.PathLike[str], *, held_out: int = 0):
        super().__init__(held_out)
        self.annotations, self.images = annotations, images

    def open(self) -> ListFile:
        """The list. Raises FileNotFoundError, and ValueError for a file that is no JSON list."""
        self.path("images")
        return ListFile(self.path("annotations"))

    def __getitem__(self, number: int) -> Example:
        where, element = self.files.where(number), self.files[number]
        example = Example({"turns": conversation(element.get("conversations"), where)}, where)
        turns_of(example)
        name = element.get("image")
        if name is not None:
            example["image"] = image_path(self.path("images"), name, where)
        return example


def conversation(turns: Any, where: str) -> list[Any]:
    """Question and answer in turn; what stands before the first question (a system's turn) or
    after the last answer is left out.

    Raises BadRow for what is no conversation.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("there is no conversation", where)
    roles = [ROLES.get(role) if isinstance(role := turn.get("from"), str) else None for turn in turns]
    first = roles.index(0) if 0 in roles else len(roles)
    values = [turn.get("value") for turn in turns][first:]
    values = values[: len(values) - len(values) % 2]
    if roles[first:] != [place % 2 for place in range(len(roles) - first)]:
        raise BadRow("the turns are not question and answer", where, [turn.get("from") for turn in turns][:8])
    return values
