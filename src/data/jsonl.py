"""Lines of JSON in some files of a folder, by number."""

from __future__ import annotations

import functools
import os
from typing import Any

import numpy as np
from etils import epath

from src.common.files import local_copy
from src.data.ledger import BadRow
from src.data.pictures import LINE_BYTES, line_ends, parse_example


class JsonLines:
    """The lines of all files of a folder that are called like `names` (`*.jsonl`), one file after the other by name.

    The lines are found once and not kept. Raises FileNotFoundError if there is no such file.
    """

    def __init__(self, folder: epath.Path, names: str):
        paths = sorted(folder.glob(names), key=lambda path: path.name)
        if not paths:
            raise FileNotFoundError(f"{os.fspath(folder / names)!r} does not exist: give a folder with such a file")
        self._names = [path.name for path in paths]
        self._paths = [local_copy(path) for path in paths]
        self._ends = [line_ends(path) for path in self._paths]
        self._starts = np.cumsum([0, *map(len, self._ends)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @functools.cached_property
    def _files(self) -> list[int]:
        return [os.open(path, os.O_RDONLY) for path in self._paths]

    def where(self, index: int) -> str:
        """The name of a line in reports."""
        file, line = self._find(index)
        return f"{self._names[file]} line {line + 1}"

    def __getitem__(self, index: int) -> tuple[dict[str, Any], str]:
        """What a line says, and its name. Raises BadRow."""
        file, line = self._find(index)
        ends, where = self._ends[file], self.where(index)
        start = int(ends[line - 1]) if line else 0
        if ends[line] - start > LINE_BYTES:
            raise BadRow("the line is too long", where, f"more than {LINE_BYTES:,} bytes")
        # One call that leaves the file's position alone: threads share it.
        return parse_example(os.pread(self._files[file], int(ends[line]) - start, start), where), where

    def _find(self, index: int) -> tuple[int, int]:
        file = int(np.searchsorted(self._starts, index, side="right")) - 1
        return file, index - int(self._starts[file])
