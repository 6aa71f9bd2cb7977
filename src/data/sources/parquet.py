"""Parquet and Arrow files, such as those of a Hugging Face data set: images with captions or classes, or texts.

`folder` has the files, `train-00000-of-00005.parquet` or `data/train-…`, at any depth. An image is a column of
{"bytes": …, "path": …}, of bytes, or of paths below the folder.
"""

from __future__ import annotations

import fnmatch
import functools
import os
import re

import numpy as np
from etils import epath

from src.data.example import BadRow, Example
from src.data.files.columns import ENDINGS, ColumnFile, check_schemas
from src.data.files.folder_walk import files_below
from src.data.files.index_cache import stamp
from src.data.files.left_out import LeftOut, kind_of_file, warn_tests
from src.data.sources._classes import named_classes
from src.data.sources._files import NamedFeatures, image_path


class Parquet(NamedFeatures):
    """`image`, with `label` or `caption`, or `text` and the same as `parts`, in the order of the files' paths and rows.

    image     column of the images; "" where there is `text`
    label     column of the class, a whole number; its names are those that Hugging Face wrote, or of the file `names`
    caption   column of the text, or of a list of texts
    text      column of texts without images
    split     files are read whose name, or a folder's above, is this or begins with it ("train-0.parquet"); "train",
              where none is: all
    pattern   of the paths below the folder, with `*`, instead of `split`
    names, ambiguous   of classes, as `image_folders` has them
    held_out  how many rows are "test": the last ones, of classes some all over the split
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        image: str = "image",
        label: str = "",
        caption: str = "",
        text: str = "",
        split: str = "train",
        pattern: str = "",
        names: str | os.PathLike[str] = "",
        ambiguous: str = "words",
        held_out: int = 0,
    ):
        super().__init__(held_out)
        if bool(text) == bool(label or caption):
            raise ValueError(
                "source needs label or caption beside the image, or text alone: name the columns"
                " (python -m src.tools.inspect_data shows them)"
            )
        self.folder, self.image, self.label, self.caption, self.text = folder, image, label, caption, text
        self.split, self.pattern, self.names, self.ambiguous = split, pattern, names, ambiguous

    @property
    def kind(self) -> str:
        """What the examples are."""
        return "documents" if self.text else super().kind

    @functools.cached_property
    def classes(self) -> list[dict[str, str]]:
        """Id and name of each class; none of labels that are plain numbers. Raises ValueError for other labels."""
        if not self.label:
            return []
        first = self.files[0][0]
        if "int" not in first.types[self.label]:
            raise ValueError(
                f"source.label={self.label!r} is {first.types[self.label]}: name a column of whole numbers"
            )
        feature = first.features.get(self.label)
        ids = feature.get("names") if isinstance(feature, dict) else None
        return named_classes(list(map(str, ids)), self.names, self.ambiguous) if ids else []

    def open(self) -> tuple[list[ColumnFile], np.ndarray]:
        """The files, and the number of each one's first row.

        Raises FileNotFoundError for a folder without such files, ValueError for one that is damaged, lacks a column or
        has another schema.
        """
        folder = self.path("folder")
        columns = [self.text] if self.text else [name for name in (self.image, self.label, self.caption) if name]
        files = [ColumnFile(folder / path, columns) for path in self._chosen(folder)]
        check_schemas(files)
        return files, np.cumsum([0, *map(len, files)])

    def _chosen(self, folder: epath.Path) -> list[str]:
        left, found = LeftOut(), list[str]()
        for path in files_below(folder, left):
            name = os.path.basename(path)
            if name.lower().endswith(ENDINGS) and not name.startswith("."):
                found.append(path)
            elif not name.startswith("."):
                left.add(kind_of_file(name), path)
        own = re.compile(rf"(^|/){re.escape(self.split)}([-_./]|$)", re.IGNORECASE)
        chosen = [p for p in found if (fnmatch.fnmatchcase(p, self.pattern) if self.pattern else own.search(p))]
        if not chosen and self.split == "train" and not self.pattern:
            chosen = found
        if not chosen:
            wanted = f"called like {self.pattern!r}" if self.pattern else f"of the split {self.split!r}"
            told = ", ".join(map(repr, found[:3])) or str(left) or "nothing"
            raise FileNotFoundError(f"{os.fspath(folder)!r} has no *.parquet or *.arrow {wanted}: it has {told}")
        for path in sorted(set(found) - set(chosen)):
            left.add("files of other splits", path)
        left.warn(folder)
        warn_tests(folder, chosen)
        return sorted(chosen)

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return [*(stamp(file.path) for file in self.files[0]), self.text, self.caption, self.label]

    def __len__(self) -> int:
        _ = self.classes  # refused here, not at the first row
        return int(self.files[1][-1])

    def __getitem__(self, number: int) -> Example:
        files, starts = self.files
        place = int(np.searchsorted(starts, number, side="right")) - 1
        file, row = files[place], number - int(starts[place])
        values, where = file[row], file.where(row)
        if self.text:
            text = values[self.text]
            if not isinstance(text, str) or not text.strip():
                raise BadRow("the text is empty or no text", where)
            return Example({"text": text, "parts": [{"text": text}]}, where)
        example = Example({}, where)
        if self.label:
            example["label"] = values[self.label]
        if self.caption:
            example["caption"] = values[self.caption]
        image = values[self.image]
        if isinstance(image, dict):
            image = image.get("bytes") or image.get("path")
        if image is None:
            raise BadRow("the image is missing", where)
        example["image"] = image if isinstance(image, bytes) else image_path(self.path("folder"), image, where)
        return example
