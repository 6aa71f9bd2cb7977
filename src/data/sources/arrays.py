"""Images or latents from a folder of numpy files.

The folder holds `images.npy` [n, h, w, C] float (memory-mapped, any float type), `labels.npy` [n] and, for prompts,
`names.json`, a list with the name of each class. The files of a remote folder (`gs://`) are copied to this machine's
cache first. A label that is no class makes a bad row; a folder with many of them is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import pathlib

import numpy as np

from src.common.files.npy import read_npy
from src.common.files.store import local_copy
from src.common.files.strict_json import read_json
from src.data.example import BadRow, Example
from src.data.files.left_out import warn_beside
from src.data.sources._files import FileSource

NAMES = ("images.npy", "labels.npy", "names.json")
WRONG = 0.05  # share of labels that are no class, from which a folder is refused


@dataclasses.dataclass(frozen=True)
class _Arrays:
    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)


class Arrays(FileSource):
    """`image`, float32 [h, w, C], and its `label`; the last `held_out` rows are "test".

    moments   the arrays are moments of latents [h, w, 2L], and not what the network gets
    """

    kind = "classes"

    def __init__(self, folder: str | os.PathLike[str], *, moments: bool = False, held_out: int = 0):
        super().__init__(held_out)
        self.folder, self.holds = folder, "moments" if moments else "values"

    def open(self) -> _Arrays:
        """The arrays. Raises FileNotFoundError for missing files, ValueError for what does not belong together."""
        images = read_npy(self._file("images.npy"), mapped=True)
        if images.ndim != 4 or not np.issubdtype(images.dtype, np.floating):
            raise ValueError(
                f"{os.fspath(self.folder)!r}: images.npy holds {images.dtype} {images.shape}, expected floats"
                " [n, h, w, C]: write images as floats in [-1, 1], or latents"
            )
        labels = read_npy(self._file("labels.npy")).astype(np.int64)
        wrong = labels < 0
        if self._has_names():
            wrong |= labels >= len(self.classes)
        if labels.shape != images.shape[:1] or wrong.sum() > WRONG * len(labels):
            classes = f"{len(self.classes)} names" if self._has_names() else "any number of classes"
            raise ValueError(
                f"{os.fspath(self.folder)!r}: labels.npy has {labels.shape} labels from {labels.min(initial=0)} to"
                f" {labels.max(initial=0)} for {len(images)} images, and names.json has {classes}: give one class for"
                " each image, from 0 to classes - 1"
            )
        warn_beside(self.path("folder"), NAMES)
        return _Arrays(images, labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of each image."""
        return self.files.images.shape[1:]

    @functools.cached_property
    def classes(self) -> list[dict[str, str]]:
        """Names of the classes. Raises FileNotFoundError or ValueError if the file is missing or no list of texts."""
        names = read_json(self._file("names.json"))
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f"{os.fspath(self.folder)!r}: names.json is no list of texts: write the name of each class"
            )
        return [{"id": name, "name": name} for name in names]

    def __getitem__(self, number: int) -> Example:
        label, where = int(self.files.labels[number]), f"labels.npy row {number}"
        if label < 0:
            raise BadRow("the label is no class", where, label)
        return Example({"image": np.asarray(self.files.images[number], np.float32), "label": label}, where)

    def _has_names(self) -> bool:
        try:
            return self.classes is not None
        except FileNotFoundError:
            return False

    def _file(self, name: str) -> pathlib.Path:
        path = self.path("folder") / name
        try:
            return local_copy(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{os.fspath(path)!r} does not exist: the folder needs images.npy, labels.npy and, for prompts,"
                " names.json"
            ) from error
