"""A chat about an image: the text up to it, the image, which is only read, and the rest."""

from __future__ import annotations

from collections.abc import Mapping

from src.data.example import MARKER, BadRow, Example, Row, Source, turns_of
from src.data.images import Images
from src.data.templates._base import Request, Template
from src.data.templates.chat import Part, asked, parts_of, size_of, unanswered
from src.data.told_once import tell_cut, tell_once
from src.data.words import Words, check_too_long, field_of, text_codec
from src.interfaces import Field


class PictureChat(Template):
    """Names `text.head`, `vision` and `text.rest` (made). Targets are the answers and their </s> in the rest. Nothing
    is random. A chat without an image is text alone, with <s> in the head.

    head_length      tokens of the text before the image; a row with more is a bad row
    length           tokens of the rest; `too_long` says what happens to more: `cut` or `skip`
    marks            <|im_start|> and <|im_end|> stand around the image (not so in the published training)
    train_on_source  the questions are targets, too, those of the head among them (as published)
    headers          "### Human: " and "### Assistant: " before the turns
    question         tokens of a question with its <s> and its marker, longer ones are cut (published: 128); 0: any
    text, vision     fields

    A prompt has `turns` whose last one is a question, or a question alone, "prompt"; where no turn says where the image
    stands, it stands before the first question.
    """

    needs = answers = ("turns",)
    optional = ("image",)
    conditional = False

    def __init__(
        self,
        head_length: int,
        length: int,
        *,
        too_long: str = "cut",
        marks: bool = True,
        train_on_source: bool = False,
        headers: bool = False,
        question: int = 0,
        text: str = "text",
        vision: str = "vision",
    ):
        check_too_long(too_long)
        if question < 0:
            raise ValueError(f"question={question} is not possible: use 0 or more tokens")
        self.rooms, self.too_long, self.marks, self.sources = (head_length, length), too_long, marks, train_on_source
        self.options = {"sources": train_on_source, "headers": headers, "question": question}
        self.text, self.vision, self.fill = text, vision, (f"{text}.rest",)

    @property
    def targets(self) -> frozenset[str]:
        """The rest, with `train_on_source` the head, too."""
        return frozenset((*self.fill, *((f"{self.text}.head",) if self.sources else ())))

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        codec = text_codec(fields, self.text)
        field = field_of(fields, self.vision, "vision")
        image = Images(self.vision, field, source, made=False, always=False, encoded=False)
        head, rest = (
            Words(f"{self.text}.{n}", codec, room) for n, room in zip(("head", "rest"), self.rooms, strict=True)
        )
        self.columns = (head, image, rest)

    def question(self, example: Example) -> Example:
        """See `Template.question`."""
        return unanswered(example)

    def invented_question(self) -> Example:
        """See `Template.invented_question`."""
        return Example({"image": self.columns[1].made_up()}, "made up")

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`."""
        head, image, rest = self.columns
        turns = asked(example) if request.prompt else turns_of(example)
        make, seen = request.prompt and len(turns) % 2 == 1, example.get("image") is not None
        if request.prompt and seen and not any(MARKER in turn for turn in turns[::2]):
            turns = [MARKER + turns[0], *turns[1:]]
        before, after = self._texts(turns, example.where, seen, skip=request.prompt or self.too_long == "skip")
        row = head.row(before, prompt=request.prompt) | rest.row(after, prompt=request.prompt, make=make)
        if not request.prompt and not row[f"{rest.name}/target"].any():
            raise BadRow("the question leaves no place for an answer", example.where)
        return row | (image.row(example["image"], example.where) if seen else image.absent())

    def _texts(self, turns: list[str], where: str, seen: bool, skip: bool) -> tuple[list[Part], list[Part]]:
        """The parts of head and rest. Raises BadRow."""
        codec = self.columns[0].codec
        count = sum(turn.count(MARKER) for turn in turns[::2])
        if seen and count != 1:
            raise BadRow(f"the questions have not one {MARKER}", where, f"{count} for one image")
        parts, whole = parts_of(turns, codec, where, **self.options, marked=seen, most=sum(self.rooms))
        place = next((i for i, (ids, _) in enumerate(parts) if ids is None), None)
        if seen and place is None:
            raise BadRow("the text before the image is too long", where, f"more than {sum(self.rooms)} tokens")
        head, rest = (parts[:place], parts[place + 1 :]) if seen else (parts[:1], parts[1:])
        if seen and self.marks:
            head, rest = [*head, ([codec.image_start], False)], [([codec.image_end], False), *rest]
        if not self.sources:
            if any(learned for _, learned in head):
                tell_once("the answers before the image are no targets, which those behind it are", where)
            head = [(ids, False) for ids, _ in head]
        if size_of(head) > self.rooms[0]:
            raise BadRow("the text before the image is too long", where, f"{size_of(head)} of {self.rooms[0]} tokens")
        if not (whole and size_of(rest) <= self.rooms[1]):
            if skip:
                raise BadRow("the chat is too long", where, f"{sum(map(len, turns)):,} characters")
            tell_cut("text behind the image", self.rooms[1], where)
        return head, rest
