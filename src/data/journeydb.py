"""JourneyDB (Sun et al. 2023): pictures with the prompt that made them and a caption.

`annotations` is a file with a line {"img_path": "./000/a.jpg", "prompt": "…", "Task2": {"Caption": "…"}} for each
picture, `images` the folder that the paths start from. A picture that is missing is a bad row, not its neighbour.
"""

from __future__ import annotations

import os
from typing import Any

from etils import epath

from src.data import pictures
from src.data.example import Example
from src.data.file_task import given
from src.data.files.json_lines import LineFile
from src.data.pictures import path_of

PHRASE = "Please generate an image of {}"  # MonoFormer's, without a full stop


class Journey:
    """The lines of the annotations by number; `told` has `prompt` and `caption`, as far as they are there.

    Raises FileNotFoundError.
    """

    kind = "captions"

    def __init__(self, annotations: epath.Path, images: epath.Path):
        self._lines, self._images = LineFile(annotations), images

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> Example:
        where, line = self._lines.where(index), self._lines[index]
        task2 = line.get("Task2")
        told = {"prompt": line.get("prompt"), "caption": task2.get("Caption") if isinstance(task2, dict) else None}
        told = {name: text for name, text in told.items() if isinstance(text, str)}
        return Example(where, told, (path_of(self._images, line.get("img_path"), where),))


class _Journey:
    """Opens the source; the options of the task itself are those of `pictures`."""

    kind = "captions"

    def __init__(
        self,
        codec: Any,
        size: int,
        length: int,
        *,
        annotations: str | os.PathLike[str] = "",
        images: str | os.PathLike[str] = "",
        **options: Any,
    ):
        super().__init__(codec, size, length, **options)
        self.annotations, self.images = annotations, images

    def open(self) -> Journey:
        """The annotations."""
        return Journey(given(self.annotations, "annotations", self.name), given(self.images, "images", self.name))


class CaptionToImage(_Journey, pictures.CaptionToImage):
    """`pictures.CaptionToImage` from JourneyDB: "Please generate an image of {prompt}"; `text` is prompt | caption."""

    name = "journeydb_caption_to_image"

    def __init__(self, codec, size, length, *, text: str = "prompt", phrase: str = PHRASE, **options: Any):
        super().__init__(codec, size, length, text=text, phrase=phrase, **options)


class ImageToCaption(_Journey, pictures.ImageToCaption):
    """`pictures.ImageToCaption` from JourneyDB: the caption of Task2, or with `text="prompt"` the prompt."""

    name = "journeydb_image_to_caption"
