"""Tasks that read files: the source of the subclass, or the shards that were made of it."""

from __future__ import annotations

import functools
import os
from typing import Any, ClassVar

import numpy as np
from etils import epath

from src.data.example import Example, Examples
from src.data.files.latent_shards import check_moments
from src.data.files.shards import Shards
from src.data.pipeline.bad_rows import BadRow
from src.data.rows import RowTask, check_split

BEFORE = "before"  # of a piece of a chat that is told: how many turns of the chat are in earlier rows


class ExampleTask(RowTask):
    """A task over a source of files, or over shards that `tools.prepare` made of it.

    records    a folder of such shards, read instead of the source's own files
    held_out   how many rows are the split "test": the last ones, or, with `spread`, some all over the source. Of a chat
               that is split into several rows all are "test" when one is, which may be a few more

    The source is opened at the first row, so that spec and `fake` work without it. Subclasses say how (`open`).
    """

    kind: ClassVar[str] = "captions"
    spread: ClassVar[bool] = False

    def __init__(self, *, records: str | os.PathLike[str] = "", held_out: int = 0):
        if held_out < 0:
            raise ValueError(f"held_out={held_out} is not possible: give no negative number of rows")
        self.records, self.held_out = records, held_out

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself.
        return {name: value for name, value in self.__dict__.items() if name != "examples"}

    def open(self) -> Examples:
        """The source.

        Raises FileNotFoundError if files are missing, ValueError if they are damaged.
        """
        raise NotImplementedError

    @functools.cached_property
    def examples(self) -> Examples:
        """The source, or its shards."""
        if not self.records:
            return self.open()
        shards = Shards(epath.Path(self.records), self.kind)
        buckets = getattr(self, "buckets", None)
        check_moments(shards.moments, self.image_shape, self.name, os.fspath(self.records), buckets)
        if buckets and shards.cut:
            raise ValueError(
                f"task {self.name} has buckets, and the pictures in {os.fspath(self.records)!r} were cut to squares of"
                f" {shards.cut} pixels: prepare them anew without --size"
            )
        return shards

    @property
    def latents_of(self) -> str | None:
        """The hash of the codec whose moments of latents the data are, None for pictures."""
        moments = getattr(self.examples, "moments", None)
        return moments and moments.codec

    def rows(self, split: str) -> int:
        """Rows of the split, bad ones included.

        Raises FileNotFoundError if files are missing, ValueError if they are damaged or the split is empty.
        """
        check_split(self.name, split)
        total = len(self.examples)
        rows = self._held if split == "test" else total - self._held
        if not 0 < rows <= total:
            raise ValueError(
                f"split {split!r} of task {self.name} is empty: it has {total} rows and held_out={self.held_out} of"
                " them are for test: give more, or set another held_out"
            )
        return rows

    @functools.cached_property
    def _held(self) -> int:
        """`held_out`, and the rows before these that are of the same chat."""
        held, total = self.held_out, len(self.examples)
        inside = False
        while self.kind == "chats" and 0 < held < total and (inside := self._goes_on(total - held, inside)):
            held += 1
        return held

    def _goes_on(self, place: int, inside: bool) -> bool:
        """Whether earlier rows are of the same chat; a damaged one is taken to be like the row behind it."""
        try:
            return bool(self.examples[place].told.get(BEFORE))
        except BadRow:
            return inside

    def example(self, split: str, index: int) -> Example:
        """The example of a row. Raises BadRow."""
        return self.examples[self.place(split, index)]

    def place(self, split: str, index: int) -> int:
        """Number of a row in the source."""
        if not self.held_out:
            return index
        if not self.spread:
            return index + (self.rows("train") if split == "test" else 0)
        held = (2 * np.arange(self.held_out) + 1) * len(self.examples) // (2 * self.held_out)
        if split == "test":
            return int(held[index])
        return index + int(np.searchsorted(held - np.arange(self.held_out), index, side="right"))


def given(value: str | os.PathLike[str], option: str, task: str) -> epath.Path:
    """A path that a task needs. Raises ValueError where it is empty."""
    if not os.fspath(value):
        raise ValueError(f"task {task} needs {option}, or records of it: give the path in tasks.<name>.data.{option}")
    return epath.Path(value)
