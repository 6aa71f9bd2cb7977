"""Chats of user and assistant: files `*.jsonl` with a line {"data": ["question", "answer", …]} for each chat, as
UltraChat has them, or in one of the other forms of `_chats.py`; or files `*.json`, which may be one list of these; or
either of them in gzip or zstd; or Parquet and Arrow files with such columns."""

from __future__ import annotations

import os

import numpy as np

from src.data.example import BadRow, Example, turns_of
from src.data.files.columns import ColumnFile, check_schemas
from src.data.files.index_cache import cached_table
from src.data.files.json_lines import JsonLines
from src.data.files.json_list import open_rows
from src.data.sources._chats import FORM, read_turns, tell_marker
from src.data.sources._files import FileSource
from src.data.sources._tool_turns import check_tools, with_tools_as_text

FILES = ("*.jsonl", "*.json", "*.jsonl.gz", "*.jsonl.zst", "*.json.gz", "*.json.zst", "*.parquet", "*.arrow")


class UltraChat(FileSource):
    """`turns` of the chats of a folder, in the order of the files' names and lines; `held_out` rows are "test".

    split    longest piece, in characters (three times the tokens of a row are usual): longer chats are several
             examples, each of whole questions with answers; a question with its answer that is longer stays one.
             0: a chat is one example
    names    of the files, with `*`; "": those of the first of `FILES` that there are
    tools    hermes: calls of tools, what they answer, and lists of tools become text (`_tool_turns.py`); "": chats with
             tools are bad rows

    When one piece of a chat is held out, all are, which may be a few more rows.
    """

    kind = "chats"

    def __init__(
        self,
        folder: str | os.PathLike[str],
        *,
        split: int = 0,
        names: str = "",
        tools: str = "",
        held_out: int = 0,
    ):
        super().__init__(held_out)
        self.folder, self.split, self.names, self.tools = folder, split, names, check_tools(tools)

    def open(self) -> tuple[JsonLines, np.ndarray | None]:
        """The lines, and where the pieces of chats are; FileNotFoundError for a folder without such files."""
        names = [self.names] if self.names else FILES
        lines = JsonLines(self.path("folder"), names, FORM, open_rows)
        check_schemas([file for file in lines.files if isinstance(file, ColumnFile)])
        lines.left.warn(self.path("folder"))
        if not self.split:
            return lines, None
        key = [str(self.split), self.tools, *lines.identity()]
        return lines, cached_table("chats", key, lambda: self._pieces(lines))

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return [*self.files[0].identity(), *([str(self.split)] if self.split else []), self.tools]

    def goes_on(self, number: int) -> bool:
        """Whether earlier rows are of the same chat. Raises BadRow."""
        return bool(self[number].get("before"))

    def __len__(self) -> int:
        lines, found = self.files
        return len(lines) if found is None else len(found)

    def __getitem__(self, number: int) -> Example:
        lines, found = self.files
        if found is None:
            return self._chat(lines, number)
        chat, first, last = map(int, found[number])
        whole = self._chat(lines, chat)
        if not last:
            return whole
        piece = {"turns": whole["turns"][first:last]} | ({"before": first} if first else {})
        return Example(piece, f"{whole.where} turns {first + 1} to {last}")

    def _chat(self, lines: JsonLines, number: int) -> Example:
        row, where = lines[number]
        row = with_tools_as_text(row, where) if self.tools else row
        example = Example({"turns": read_turns(row, where)}, where)
        tell_marker(turns_of(example), where)
        return example

    def _pieces(self, lines: JsonLines) -> np.ndarray:
        """Chat, first turn and last turn (not included) of each piece, int64 [n, 3]; a bad row has 0, 0."""
        rows: list[tuple[int, int, int]] = []
        for number in range(len(lines)):
            try:
                rows += [(number, *piece) for piece in pieces(self._chat(lines, number)["turns"], self.split)]
            except BadRow:
                rows.append((number, 0, 0))
        return np.array(rows, np.int64).reshape(-1, 3)


def pieces(turns: list[str], most: int) -> list[tuple[int, int]]:
    """First turn and last (not included) of pieces of whole pairs of turns, greedily up to `most` characters each."""
    found, first, size = [], 0, 0
    for place in range(0, len(turns), 2):
        pair = len(turns[place]) + len(turns[place + 1])
        if place > first and size + pair > most:
            found.append((first, place))
            first, size = place, 0
        size += pair
    return [*found, (first, len(turns))]
