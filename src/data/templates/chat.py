"""Chats of user and assistant, one to a row: `<s> question answer </s>` for each pair of turns, as in MonoFormer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.example import MARKER, BadRow, Example, Row, Source, turns_of
from src.data.templates._base import Request, Template
from src.data.told_once import tell_cut, tell_image, tell_special
from src.data.words import CHARACTERS, Words, check_too_long, text_codec
from src.interfaces import Field

HEADERS = ("### Human: ", "### Assistant: ")
Part = tuple[list[int] | None, bool]  # ids, are they targets? None stands for the image


def parts_of(
    turns: list[str],
    codec: Any,
    where: str,
    *,
    most: int,
    sources: bool = False,
    headers: bool = False,
    question: int = 0,
    marked: bool = False,
) -> tuple[list[Part], bool]:
    """The parts of a chat, and whether it was encoded to its end: <s> question answer </s> for each pair of turns,
    targets are answers and </s>.

    sources    questions, and each <s> but the first, are targets too (the published train_on_source)
    headers    "### Human: " and "### Assistant: " stand before the turns
    question   tokens that a question may have with its <s> and its image's marker, longer ones are cut, and the
               marker stays; 0: any number
    most       tokens after which nothing more is encoded; a text is cut to `CHARACTERS` times that before it is
    marked     the first `<image>` of a question becomes a part None, and the texts on both sides parts of their own

    Raises BadRow for characters that the codec does not know.
    """
    parts: list[Part] = []
    used, prefix = 0, HEADERS if headers else ("", "")

    def encode(text: str, room: int | None) -> list[int]:
        text = text[: CHARACTERS * most]
        tell_special(text, where)
        try:
            return list(codec.encode(text))[:room] if text else []
        except ValueError as error:
            raise BadRow("the text cannot be encoded", where, error) from error

    for place, turn in enumerate(turns):
        if used >= most:
            return parts, False
        answer = place % 2 == 1
        if not answer:
            parts.append(([codec.bos], sources and place > 0))
        before, image, after = prefix[answer] + turn, "", ""
        if marked and not answer:
            before, image, after = before.partition(MARKER)
        room = max(question - 1 - bool(image), 0) if question and not answer else None
        ids = encode(before, room)
        parts.append((ids, answer or sources))
        if image:
            marked, room = False, None if room is None else room - len(ids)
            parts += [(None, False), (encode(after, room), sources)]
        if answer:
            parts.append(([codec.eos], True))
        used = sum(len(ids or ()) for ids, _ in parts)
    return parts, max(map(len, turns)) <= CHARACTERS * most


class Chat(Template):
    """The name `text` of `length` tokens; targets are the answers and their </s>. Nothing is random.

    turns            all | last: all questions with their answers, or only the last pair (as published)
    too_long         what happens to longer chats: `cut` (their beginning is used) or `skip` (they are bad rows).
                     A source may have split them before (`ultrachat`)
    train_on_source  the questions are targets, too (as published)
    headers          "### Human: " and "### Assistant: " before the turns
    question         tokens of a question with its <s>, longer ones are cut (published: 128); 0: any number
    text             the field

    A prompt has `turns` whose last one is a question, or a question alone, "prompt".
    """

    needs = answers = ("turns",)
    conditional = False

    def __init__(
        self,
        length: int,
        *,
        turns: str = "all",
        too_long: str = "cut",
        train_on_source: bool = False,
        headers: bool = False,
        question: int = 0,
        text: str = "text",
    ):
        check_too_long(too_long)
        if turns not in ("all", "last"):
            raise ValueError(f"turns={turns!r} is unknown: use all or last")
        if question < 0 or length < 3:
            raise ValueError(
                f"question={question}, length={length} is not possible: use 0 or more, and at least 3 tokens"
            )
        self.length, self.turns, self.too_long, self.text, self.fill = length, turns, too_long, text, (text,)
        self.options = {"sources": train_on_source, "headers": headers, "question": question}

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.columns = (Words(self.text, text_codec(fields, self.text), self.length),)

    def question(self, example: Example) -> Example:
        """See `Template.question`."""
        return unanswered(example)

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`."""
        (words,) = self.columns
        turns = asked(example) if request.prompt else turns_of(example)
        make = request.prompt and len(turns) % 2 == 1
        turns = turns[-2 + make :] if self.turns == "last" else turns
        tell_image(example, example.where)
        parts, whole = parts_of(turns, words.codec, example.where, **self.options, most=words.length)
        whole = whole and size_of(parts) <= words.length
        if not whole and (self.too_long == "skip" or request.prompt):
            raise BadRow("the chat is too long", example.where, f"{sum(map(len, turns)):,} characters")
        row = words.row(parts, prompt=request.prompt, make=make)
        if not request.prompt and not row[f"{self.text}/target"].any():
            raise BadRow("the question leaves no place for an answer", example.where, f"{len(turns[0]):,} characters")
        if not whole:
            tell_cut("chat", words.length, example.where)
        return row


def unanswered(example: Example) -> Example:
    """A chat without its last answer."""
    return Example(dict(example) | {"turns": turns_of(example)[:-1]}, example.where)


def asked(example: Example) -> list[str]:
    """The turns of a prompt, the last one a question, or those of a whole chat. Raises BadRow."""
    turns = example.get("turns", [example.get("prompt", "")])
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRow("the turns are no list of texts", example.where)
    return turns


def size_of(parts: list[Part]) -> int:
    """Tokens of some parts."""
    return sum(len(ids or ()) for ids, _ in parts)
