"""What sources of files share."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, ClassVar

from etils import epath

from src.common.files.paths import inside
from src.data.example import BadRow
from src.data.told_once import marks_of, tell_keys, tell_odd, tell_split

CAPTION = ("caption", "text")


class FileSource:
    """A source whose files are opened at the first row, and by each process on its own.

    Subclasses write `open`, which finds the examples in the files, and `__getitem__`, which reads one of `files`.
    """

    kind: ClassVar[str] = "captions"  # see `files/shards.py`
    spread: ClassVar[bool] = False

    def __init__(self, held_out: int = 0):
        self.held_out = held_out

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "files"}

    def open(self) -> Any:
        """What `files` is. Raises FileNotFoundError if files are missing, ValueError if they are damaged."""
        raise NotImplementedError

    @functools.cached_property
    def files(self) -> Any:
        """The opened files."""
        return self.open()

    def __len__(self) -> int:
        return len(self.files)

    def path(self, option: str) -> epath.Path:
        """A path that is needed. Raises ValueError where it is empty."""
        value = getattr(self, option)
        if not os.fspath(value):
            raise ValueError(f"source.{option} is empty: give the path")
        return epath.Path(value)


class NamedFeatures(FileSource):
    """Files whose rows have an image with a class or a text, under names that the config gives.

    A subclass has `label`, the name of the class or "", and may cache `classes`, which no process inherits.
    """

    label: str

    @property
    def kind(self) -> str:
        """What the examples are."""
        return "classes" if self.label else "captions"

    @property
    def spread(self) -> bool:
        """Rows of classes are sorted."""
        return bool(self.label)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in super().__getstate__().items() if name != "classes"}


def texts_of_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The texts of a row by name; the first of `CAPTION` that it has as "caption", too, which may be a list of several
    texts, and is left as it is where it is no text, for `texts_of` to refuse. Other keys are told, and so is the second
    of `CAPTION` where it says something else."""
    tell_split(row, where)
    said = [name for name in CAPTION if row.get(name) is not None]
    used = next((name for name in said if isinstance(row[name], str | list)), said[0] if said else "")
    marks = [*marks_of(row), *(name for name in said if row[name] and row[name] != row[used])]
    texts = {name: text for name, text in row.items() if isinstance(text, str)}
    others = {name: value for name, value in row.items() if name not in texts}
    tell_keys(others, where, (used,), "beside the caption", marks)
    tell_keys(texts, where, (used,), "beside the caption", marks, "is read where a template names it, alone")
    for text in [row[used]] if used in texts else ():
        tell_odd(text, where)
    return texts | ({"caption": row[used]} if used else {})


def image_path(folder: epath.Path, name: Any, where: str) -> epath.Path:
    """The path of an image that a file names. Raises BadRow."""
    try:
        return inside(folder, name)
    except ValueError as error:
        raise BadRow("the name of the image is not allowed", where, error) from error
