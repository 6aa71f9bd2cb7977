"""Lines of JSON in some files of a folder, by number."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from etils import epath

from src.data.examples import LineFile


class JsonLines:
    """The lines of all files of a folder that are called like `names` (`*.jsonl`), one file after the other by name.

    Raises FileNotFoundError if there is no such file.
    """

    def __init__(self, folder: epath.Path, names: str):
        paths = sorted(folder.glob(names), key=lambda path: path.name)
        if not paths:
            raise FileNotFoundError(f"{os.fspath(folder / names)!r} does not exist: give a folder with such a file")
        self.files = [LineFile(path) for path in paths]
        self._starts = np.cumsum([0, *map(len, self.files)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    def identity(self) -> list[tuple[str, int, int]]:
        """Path, bytes and time of the last change of each file: what changes when they do."""
        found = [(os.fspath(file.path), os.stat(file.path)) for file in self.files]
        return [(os.path.abspath(path), status.st_size, status.st_mtime_ns) for path, status in found]

    def where(self, index: int) -> str:
        """The name of a line in reports."""
        file, line = self._find(index)
        return file.where(line)

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        """What a line says, and its name. Raises BadRow."""
        file, line = self._find(index)
        return file[line], file.where(line)

    def _find(self, index: int) -> tuple[LineFile, int]:
        number = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self.files[number], index - int(self._starts[number])
