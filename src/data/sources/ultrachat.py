"""Chats of user and assistant: files `*.jsonl` with a line {"data": ["question", "answer", …]} for each chat, as
UltraChat has them, or in one of the other forms of `_chats.py`; or files `*.json`, which may be one list of these."""

from __future__ import annotations

import os

import numpy as np

from src.data.example import BadRow, Example, turns_of
from src.data.files.index_cache import cached_table
from src.data.files.json_lines import JsonLines
from src.data.files.json_list import open_rows
from src.data.sources._chats import FORM, read_turns, tell_marker
from src.data.sources._files import FileSource


class UltraChat(FileSource):
    """`turns` of the chats of a folder, in the order of the files' names and lines; `held_out` rows are "test".

    split    longest piece, in characters (three times the tokens of a row are usual): longer chats are several
             examples, each of whole questions with answers; a question with its answer that is longer stays one.
             0: a chat is one example
    names    of the files, with `*`; "": `*.jsonl`, or, where there is none, `*.json`

    When one piece of a chat is held out, all are, which may be a few more rows.
    """

    kind = "chats"

    def __init__(self, folder: str | os.PathLike[str], *, split: int = 0, names: str = "", held_out: int = 0):
        super().__init__(held_out)
        self.folder, self.split, self.names = folder, split, names

    def open(self) -> tuple[JsonLines, np.ndarray | None]:
        """The lines, and where the pieces of chats are; FileNotFoundError for a folder without such files."""
        names = [self.names] if self.names else ["*.jsonl", "*.json"]
        lines = JsonLines(self.path("folder"), names, FORM, open_rows)
        lines.left.warn(self.path("folder"))
        if not self.split:
            return lines, None
        key = [str(self.split), *lines.identity()]
        return lines, cached_table("chats", key, lambda: _pieces_of(lines, self.split))

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return [*self.files[0].identity(), *([str(self.split)] if self.split else [])]

    def goes_on(self, number: int) -> bool:
        """Whether earlier rows are of the same chat. Raises BadRow."""
        return bool(self[number].get("before"))

    def __len__(self) -> int:
        lines, found = self.files
        return len(lines) if found is None else len(found)

    def __getitem__(self, number: int) -> Example:
        lines, found = self.files
        if found is None:
            return _chat(lines, number)
        chat, first, last = map(int, found[number])
        whole = _chat(lines, chat)
        if not last:
            return whole
        piece = {"turns": whole["turns"][first:last]} | ({"before": first} if first else {})
        return Example(piece, f"{whole.where} turns {first + 1} to {last}")


def _chat(lines: JsonLines, number: int) -> Example:
    line, where = lines[number]
    example = Example({"turns": read_turns(line, where)}, where)
    tell_marker(turns_of(example), where)
    return example


def _pieces_of(lines: JsonLines, most: int) -> np.ndarray:
    """Chat, first turn and last turn (not included) of each piece, int64 [n, 3]; a bad row has 0, 0."""
    rows: list[tuple[int, int, int]] = []
    for number in range(len(lines)):
        try:
            rows += [(number, *piece) for piece in pieces(_chat(lines, number)["turns"], most)]
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
