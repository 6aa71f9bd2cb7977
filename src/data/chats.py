"""Chats of user and assistant as rows of text: UltraChat's files, or prepared shards.

`folder` holds files `*.jsonl` with a line {"data": ["question", "answer", …]} for
each chat. A chat is, for each question and its answer, <s> question answer </s>, as in MonoFormer.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from etils import epath

from src.data.example import MARKER, Example, turns_of
from src.data.file_task import BEFORE, ExampleTask, given
from src.data.files.index_cache import cached_table
from src.data.files.json_lines import JsonLines
from src.data.pipeline.bad_rows import BadRow
from src.data.rows import CHARACTERS, prompt_field
from src.interfaces import Field, TokenField
from src.sequence.layout import Segment

USUAL = 3  # characters of a token: chats are split into pieces of so many times `length`
TEMPLATE = ("### Human: ", "### Assistant: ")


class UltraChat:
    """The chats of a folder by number, in the order of the files' names and lines.

    split    longest piece, in characters: longer chats are several examples, each of whole questions with answers; a
             question with its answer that is longer stays one. 0: a chat is one example
    names    of the files, with `*`

    Raises FileNotFoundError for a missing folder or one without such files.
    """

    kind = "chats"

    def __init__(self, folder: epath.Path, split: int = 0, names: str = "*.jsonl"):
        self._lines = JsonLines(folder, names, '{"data": ["question", "answer"]} for each chat')
        self._pieces: np.ndarray | None = None
        if split:
            self._pieces = cached_table("chats", [str(split), *self.identity()], lambda: self._split(split))

    def __len__(self) -> int:
        return len(self._lines) if self._pieces is None else len(self._pieces)

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return self._lines.identity()

    def __getitem__(self, index: int) -> Example:
        if self._pieces is None:
            return self._chat(index)
        chat, first, last = map(int, self._pieces[index])
        whole = self._chat(chat)
        told = {"turns": whole.told["turns"][first:last]} if last else whole.told
        told = told | {BEFORE: first} if first else told
        return Example(f"{whole.where} turns {first + 1} to {last}" if last else whole.where, told)

    def _chat(self, index: int) -> Example:
        told, where = self._lines[index]
        turns = told.get("data")
        if isinstance(turns, list):
            turns = turns[: len(turns) - len(turns) % 2]  # a last question without answer teaches nothing
        return Example(where, {"turns": turns_of({"turns": turns}, where)})

    def _split(self, most: int) -> np.ndarray:
        """Chat, first turn and last turn (not included) of each piece, int64 [n, 3]; a bad row has 0, 0."""
        rows = []
        for index in range(len(self._lines)):
            try:
                turns = self._chat(index).told["turns"]
            except BadRow:
                rows.append((index, 0, 0))
                continue
            rows += [(index, *piece) for piece in pieces(turns, most)]
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


Part = tuple[list[int] | None, bool]  # ids, are they targets? None stands for the picture


def parts_of(
    turns: list[str],
    codec: Any,
    *,
    most: int,
    sources: bool = False,
    template: bool = False,
    question: int = 0,
    marked: bool = False,
) -> list[Part]:
    """The parts of a chat: <s> question answer </s> for each pair of turns, targets are answers and </s>.

    sources    questions, and each <s> but the first, are targets too (the published train_on_source)
    template   "### Human: " and "### Assistant: " stand before the turns
    question   tokens that a question may have with its <s> and its picture's marker, longer ones are cut, and the
               marker stays; 0: any number
    most       tokens after which nothing more is encoded; a text is cut to `CHARACTERS` times that before it is
    marked     the first `<image>` of a question becomes a part None, and the texts on both sides parts of their own

    Raises ValueError for characters that the codec does not know.
    """
    parts: list[Part] = []
    used, prefix = 0, TEMPLATE if template else ("", "")
    for place, turn in enumerate(turns):
        if used >= most:
            break
        answer = place % 2 == 1
        parts += [] if answer else [([codec.bos], sources and place > 0)]
        before, picture, after = (prefix[answer] + turn).partition(MARKER if marked and not answer else "\0")
        room = max(question - 1 - bool(picture), 0) if question and not answer else None
        ids = list(codec.encode(before[: CHARACTERS * most]))[:room] if before else []
        parts += [(ids, answer or sources)]
        if picture:
            marked, room = False, None if room is None else room - len(ids)
            parts += [(None, False), (list(codec.encode(after[: CHARACTERS * most]))[:room] if after else [], sources)]
        parts += [([codec.eos], True)] if answer else []
        used = sum(len(ids or ()) for ids, _ in parts)
    return parts


class ChatToText(ExampleTask):
    """A chat: one text segment `text` of `length` tokens; the loss is on the answers and their </s>.

    turns            all | last: all questions with their answers, or only the last pair (as published)
    too_long         what happens to longer chats: `cut` (their beginning is used), `split` (several rows, each of whole
                     questions with answers and of at most 3 · length characters, what is longer is cut; records hold
                     such rows if they were prepared so), `skip` (bad rows)
    train_on_source  the loss is on the questions, too (as published)
    template         "### Human: " and "### Assistant: " before the turns
    question         tokens of a question with its <s>, longer ones are cut (published: 128); 0: any number
    records          shards that `tools.prepare` made, read instead of `folder`; `held_out`: the last rows are "test"
    """

    name = "chat"
    kind = "chats"
    targets = frozenset({"text"})

    def __init__(
        self,
        codec: Any,
        length: int,
        *,
        folder: str | os.PathLike[str] = "",
        turns: str = "all",
        too_long: str = "cut",
        train_on_source: bool = False,
        template: bool = False,
        question: int = 0,
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
    ):
        super().__init__(records=records, held_out=held_out)
        if turns not in ("all", "last") or too_long not in ("cut", "split", "skip"):
            raise ValueError(f"turns={turns!r}, too_long={too_long!r}: use all or last, and cut, split or skip")
        if question < 0 or length < 3:
            raise ValueError(
                f"question={question}, length={length} is not possible: use 0 or more, and at least 3 tokens"
            )
        if too_long == "split" and turns == "last":
            raise ValueError("too_long='split' does not go with turns='last': use turns='all'")
        self.codec, self.folder, self.turns, self.too_long = codec, folder, turns, too_long
        self.train_on_source, self.template, self.question = train_on_source, template, question
        self.segments = (Segment("text", "text", length),)

    def open(self) -> UltraChat:
        """The folder's chats."""
        split = USUAL * self.length if self.too_long == "split" else 0
        return UltraChat(given(self.folder, "folder", self.name), split)

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's `ids` [length], how many they are, `used`, and which are targets, `loss` [length].

        Raises BadRow.
        """
        example, room = self.example(split, index), self.length
        turns = turns_of(example.told, example.where)
        turns = turns[-2:] if self.turns == "last" else turns
        try:
            options = {"sources": self.train_on_source, "template": self.template, "question": self.question}
            parts = parts_of(turns, self.codec, **options, most=room)
        except ValueError as error:
            raise BadRow("the text cannot be encoded", example.where, error) from error
        whole = len(parts) == 2 * len(turns) and sum(len(ids) for ids, _ in parts) <= room
        whole = whole and max(map(len, turns)) <= CHARACTERS * room
        if not whole and self.too_long == "skip":
            raise BadRow("the chat is too long", example.where, f"{sum(map(len, turns)):,} characters")
        row = filled(parts, room, self.codec.pad)
        if not row["loss"].any():
            raise BadRow("the question leaves no place for an answer", example.where, f"{len(turns[0]):,} characters")
        return row

    def blank(self) -> dict[str, np.ndarray]:
        """Arrays of the same shapes for a row that was refused."""
        return filled([], self.length, self.codec.pad)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows; nothing is random."""
        return {"text": text_field(extra)}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `text` [1, N] as far as it is given, to be continued: <s> and the question.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        prefix = TEMPLATE if self.template else ("", "")
        ids = [self.codec.bos, *(self.codec.encode(prefix[0] + words) if words else ())]
        return prompt_field(words, ids, self.length, self.codec.pad)


def filled(parts: list[Part], room: int, pad: int, prefix: str = "") -> dict[str, np.ndarray]:
    """`ids` [room], `used`, `loss` [room] of the parts, cut after `room`; the names begin with `prefix`."""
    ids = [i for part, _ in parts for i in part][:room]
    loss = [target for part, target in parts for _ in part][:room]
    row = {"ids": np.full(room, pad, np.int32), "used": np.asarray(len(ids)), "loss": np.zeros(room, bool)}
    row["ids"][: len(ids)], row["loss"][: len(ids)] = ids, loss
    return {prefix + name: leaf for name, leaf in row.items()}


def text_field(extra: dict[str, np.ndarray], prefix: str = "") -> TokenField:
    """The field of rows that `filled` made."""
    valid = np.arange(extra[prefix + "ids"].shape[1]) < extra[prefix + "used"][:, None]
    return TokenField(extra[prefix + "ids"], valid, extra[prefix + "loss"])
