"""Images or latents from a folder of numpy files, prompted by the names of their classes or by the class itself.

The folder holds `images.npy` [n, h, w, C] float (memory-mapped, any float type), `labels.npy` [n] and `names.json`, a
list with the name of each class. The last `held_out` rows are the split "test"; the others are "train". The files of a
remote folder (`gs://`) are copied to this machine's cache first. A label that is no class makes a bad row; a folder
with many of them is refused.
"""

from __future__ import annotations

import functools
import os
import pathlib
from typing import Any

import numpy as np
from etils import epath

from src.common.files.npy import read_npy
from src.common.files.store import local_copy
from src.common.files.strict_json import read_json
from src.data.class_prompts import ClassPrompts
from src.data.pipeline.bad_rows import BadRow
from src.data.rows import RowTask, check_split, image_tokens
from src.interfaces import Field, ImageField, LabelField
from src.sequence.layout import Segment

WRONG = 0.05  # share of labels that are no class, from which a folder is refused


class _Folder(RowTask):
    """The rows of a folder. The folder is opened at the first row, so that spec and `fake` work without it."""

    def __init__(self, folder: str | os.PathLike, height: int, width: int, channels: int, held_out: int):
        self.folder = epath.Path(folder)
        self.image_shape = (height, width, channels)
        self.held_out = held_out

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself instead of receiving the arrays.
        return {name: value for name, value in self.__dict__.items() if name not in ("_images", "_labels", "names")}

    @functools.cached_property
    def _images(self) -> np.ndarray:
        images = read_npy(self._file("images.npy"), mapped=True)
        if images.shape[1:] != self.image_shape or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(
                f"{self.folder / 'images.npy'} holds {images.dtype} {tuple(images.shape[1:])} but the task expects "
                f"floats {self.image_shape}: set height, width and channels to those of the file"
            )
        return images

    @functools.cached_property
    def _labels(self) -> np.ndarray:
        labels = read_npy(self._file("labels.npy")).astype(np.int64)
        classes = labels.max(initial=-1) + 1 if self.classes is None else self.classes
        wrong = (labels < 0) | (labels >= classes)
        if labels.shape != self._images.shape[:1] or wrong.sum() > WRONG * len(labels):
            raise ValueError(
                f"{self.folder / 'labels.npy'} has {labels.shape} labels from {labels.min(initial=0)} to "
                f"{labels.max(initial=0)} for {len(self._images)} images and {classes} classes: "
                "give one class index per image, from 0 to classes - 1"
            )
        return labels

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the classes.

        Raises FileNotFoundError or ValueError if the file is missing or does not name every class.
        """
        names = read_json(self._file("names.json"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"{self.folder / 'names.json'} is no list of texts: write the name of each class in order")
        if (self._labels >= len(names)).sum() > WRONG * len(self._labels):
            raise ValueError(
                f"{self.folder / 'names.json'} names {len(names)} classes but labels.npy has class "
                f"{self._labels.max()}: add the missing names"
            )
        return names

    def _file(self, name: str) -> pathlib.Path:
        path = self.folder / name
        try:
            return local_copy(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"task {self.name}: {str(path)!r} does not exist: "
                "the folder needs images.npy, labels.npy and names.json"
            ) from error

    def rows(self, split: str) -> int:
        """Rows of the split.

        Raises FileNotFoundError if a file is missing, ValueError if the split is empty.
        """
        check_split(self.name, split)
        rows = self.held_out if split == "test" else len(self._labels) - self.held_out
        if not 0 < rows <= len(self._labels):
            raise ValueError(
                f"split {split!r} of {str(self.folder)!r} is empty: it has {len(self._labels)} rows and "
                f"held_out={self.held_out} of them are for test: give more, or set another held_out"
            )
        return rows

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's image as float32. Raises BadRow for a label that is no class."""
        place = self._place(split, index)
        label, classes = self._labels[place], len(self.names) if self.classes is None else self.classes
        if not 0 <= label < classes:
            raise BadRow("the label is no class", f"labels.npy row {place}", f"{label} of {classes} classes")
        return {"image": np.asarray(self._images[place], np.float32)}

    def blank(self) -> dict[str, np.ndarray]:
        """An image of zeros, for a row that was refused."""
        return {"image": np.zeros(self.image_shape, np.float32)}

    def _place(self, split: str, index: Any) -> Any:
        return index + (self.rows("train") if split == "test" else 0)


class ClassPromptToImage(_Folder, ClassPrompts):
    """Class name -> image, with `ClassPrompts` around the image; `phrases` names the prompts that are used."""

    name = "class_prompt_to_image"

    def __init__(
        self,
        folder: str | os.PathLike,
        codec: Any,
        height: int,
        width: int,
        channels: int,
        prompt_length: int,
        *,
        patch: int = 2,
        image_mode: str = "bidirectional",
        drop: float = 0.1,
        held_out: int = 0,
        newline: bool = False,
        phrases: str = "fixed",
    ):
        super().__init__(folder, height, width, channels, held_out)
        image = Segment("image", "image", image_tokens(height, width, patch), image_mode)
        self.set_words(codec, prompt_length, image, drop=drop, newline=newline, phrases=phrases)

    def rows(self, split: str) -> int:
        """Rows of the split; also refuses prompts that do not fit, before the first row.

        Raises FileNotFoundError if a file is missing, ValueError if the files do not fit the task.
        """
        rows = super().rows(split)
        self.check_words()
        return rows

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: uniforms are phrase, drop."""
        words = self.words(self._labels[self._place(split, index)], uniforms)
        return {"prompt": words["prompt"], "image": ImageField(extra["image"]), "tail": words["tail"]}


class ClassToImage(_Folder):
    """Class -> image: fields label [B] and image, one image segment (SiT, DiT).

    `classes` must be given, since the spec may not open the folder. In training the label is replaced by
    `null` = `classes` with probability `drop`, so the model's label table needs classes + 1 rows.
    """

    name = "class_to_image"
    draws = 1

    def __init__(
        self,
        folder: str | os.PathLike,
        height: int,
        width: int,
        channels: int,
        classes: int,
        *,
        patch: int = 2,
        image_mode: str = "bidirectional",
        drop: float = 0.1,
        held_out: int = 0,
    ):
        super().__init__(folder, height, width, channels, held_out)
        self.classes = self.null = classes
        self.drop = drop
        self.segments = (Segment("image", "image", image_tokens(height, width, patch), image_mode),)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: the uniform number is drop."""
        labels = self._labels[self._place(split, index)]
        if uniforms is not None:
            labels = np.where(uniforms[:, 0] < self.drop, self.null, labels)
        return {"label": LabelField(labels.astype(np.int32)), "image": ImageField(extra["image"])}
