"""Pictures that are talked about: LLaVA-1.5's instruction data (Liu et al. 2023), a JSON list, or prepared shards.

An element of the list is {"image": "coco/1.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "…"}, …]}; those without "image" are text alone. A picture that cannot be read is a bad row,
never black.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from etils import epath

from src.common.files.images import read_image
from src.data.chats import Part, filled, parts_of, text_field
from src.data.example import MARKER, Example, turns_of
from src.data.file_task import ExampleTask, given
from src.data.files.json_list import ListFile
from src.data.pictures import path_of
from src.data.pipeline.bad_rows import BadRow
from src.data.rows import prompt_field, text_table
from src.interfaces import Field, ImageField, TokenField
from src.sequence.layout import Segment

ROLES = {"human": 0, "user": 0, "gpt": 1, "assistant": 1}


class Llava:
    """The elements of the list by number; `images` is the folder that the paths of pictures start from.

    Raises FileNotFoundError, and ValueError for a file that is no JSON list.
    """

    kind = "chats"

    def __init__(self, path: epath.Path, images: epath.Path):
        self._list, self._images = ListFile(path), images

    def __len__(self) -> int:
        return len(self._list)

    def __getitem__(self, index: int) -> Example:
        where, element = self._list.where(index), self._list[index]
        turns = turns_of({"turns": conversation(element.get("conversations"), where)}, where)
        name = element.get("image")
        return Example(where, {"turns": turns}, () if name is None else (path_of(self._images, name, where),))


def conversation(turns: Any, where: str) -> list[Any]:
    """Question and answer in turn; what stands before the first question or after the last answer is left out.

    Raises BadRow for what is no conversation.
    """
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise BadRow("there is no conversation", where)
    roles = [ROLES.get(role) if isinstance(role := turn.get("from"), str) else None for turn in turns]
    first = roles.index(0) if 0 in roles else len(roles)
    values = [turn.get("value") for turn in turns][first:]
    values = values[: len(values) - len(values) % 2]
    if None in roles or roles[first:] != [place % 2 for place in range(len(roles) - first)]:
        raise BadRow("the turns are not question and answer", where, [turn.get("from") for turn in turns][:8])
    return values


class PictureChatToText(ExampleTask):
    """A chat about a picture: head(text) up to it, picture, rest(text); the loss is on the answers and their </s> in
    the rest.

    head_length      tokens of the text before the picture; a row with more is a bad row. Text alone has <s> there
    length           tokens of the rest; `too_long` says what happens to more: `cut` or `skip`
    vision           what reads the pictures: `tokens`, `shape` and `preprocess`
    marks            <|im_start|> and <|im_end|> stand around the picture (not so in the published training)
    train_on_source  the loss is on the questions, too, those of the head among them (as published)
    template         "### Human: " and "### Assistant: " before the turns
    question         tokens of a question with its <s> and its marker, longer ones are cut (published: 128); 0: any
    records          shards of `tools.prepare`, read instead of `annotations`; `held_out`: the last rows are "test"
    """

    name = "picture_chat"
    kind = "chats"

    def __init__(
        self,
        codec: Any,
        vision: Any,
        head_length: int,
        length: int,
        *,
        annotations: str | os.PathLike[str] = "",
        images: str | os.PathLike[str] = "",
        too_long: str = "cut",
        marks: bool = True,
        train_on_source: bool = False,
        template: bool = False,
        question: int = 0,
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
    ):
        super().__init__(records=records, held_out=held_out)
        if too_long not in ("cut", "skip"):
            raise ValueError(f"too_long={too_long!r} is unknown: use cut or skip")
        if question < 0:
            raise ValueError(f"question={question} is not possible: use 0 or more tokens")
        self.codec, self.vision, self.annotations, self.images = codec, vision, annotations, images
        self.too_long, self.marks, self.train_on_source, self.template = too_long, marks, train_on_source, template
        self.question = question
        self.targets = frozenset({"head", "rest"} if train_on_source else {"rest"})
        self.rooms = head_length, length
        self.segments = (
            Segment("head", "text", head_length),
            Segment("picture", "vision", vision.tokens),
            Segment("rest", "text", length),
        )

    def open(self) -> Llava:
        """The list."""
        return Llava(given(self.annotations, "annotations", self.name), given(self.images, "images", self.name))

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's `picture` float32 [h, w, C] and whether it has one, `seen`; `head_` and `rest_` with `ids`, `used`,
        `loss` of these segments.

        Raises BadRow.
        """
        example = self.example(split, index)
        head, rest = self._texts(example)
        row = filled(head, self.rooms[0], self.codec.pad, "head_") | filled(
            rest, self.rooms[1], self.codec.pad, "rest_"
        )
        if not row["rest_loss"].any():
            raise BadRow("the question leaves no place for an answer", example.where)
        return row | self._picture(example)

    def blank(self) -> dict[str, np.ndarray]:
        """Arrays of the same shapes for a row that was refused."""
        return self._filled([], []) | {"picture": np.zeros(self.vision.shape, np.float32), "seen": np.asarray(False)}

    def _filled(self, head: list[Part], rest: list[Part]) -> dict[str, np.ndarray]:
        pad, (before, after) = self.codec.pad, self.rooms
        return filled(head, before, pad, "head_") | filled(rest, after, pad, "rest_")

    def _picture(self, example: Example) -> dict[str, np.ndarray]:
        if example.image is None:
            return {"picture": np.zeros(self.vision.shape, np.float32), "seen": np.asarray(False)}
        try:
            pixels = self.vision.preprocess(read_image(example.image))
        except FileNotFoundError as error:
            raise BadRow("the image is missing", example.where, example.image) from error
        except (ValueError, OSError) as error:
            raise BadRow("the image cannot be read", example.where, error) from error
        return {"picture": np.asarray(pixels, np.float32), "seen": np.asarray(True)}

    def _texts(self, example: Example) -> tuple[list[Part], list[Part]]:
        """The parts of head and rest. Raises BadRow."""
        turns, where, seen = turns_of(example.told, example.where), example.where, example.image is not None
        count = sum(turn.count(MARKER) for turn in turns[::2])
        if seen and count != 1:
            raise BadRow(f"the questions have not one {MARKER}", where, f"{count} for one picture")
        options = {"sources": self.train_on_source, "template": self.template, "question": self.question}
        try:
            parts = parts_of(turns, self.codec, **options, marked=seen, most=sum(self.rooms))
        except ValueError as error:
            raise BadRow("the text cannot be encoded", where, error) from error
        place = next((i for i, (ids, _) in enumerate(parts) if ids is None), None)
        if seen and place is None:
            raise BadRow("the text before the picture is too long", where, f"more than {sum(self.rooms)} tokens")
        head, rest = (parts[:place], parts[place + 1 :]) if seen else (parts[:1], parts[1:])
        if seen and self.marks:
            head, rest = [*head, ([self.codec.image_start], False)], [([self.codec.image_end], False), *rest]
        if not self.train_on_source:
            head = [(ids, False) for ids, _ in head]
        sizes = [sum(len(ids) for ids, _ in part) for part in (head, rest)]
        if sizes[0] > self.rooms[0]:
            raise BadRow("the text before the picture is too long", where, f"{sizes[0]} of {self.rooms[0]} tokens")
        if (sizes[1] > self.rooms[1] or parts[-1] != ([self.codec.eos], True)) and self.too_long == "skip":
            raise BadRow("the chat is too long", where, f"{sum(map(len, turns)):,} characters")
        return head, rest if seen else _unled(rest)

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows; nothing is random. The picture of a row without one is not valid."""
        picture = ImageField(extra["picture"], extra["seen"])
        return {"head": text_field(extra, "head_"), "picture": picture, "rest": text_field(extra, "rest_")}

    def fixed_texts(self) -> dict[str, TokenField]:
        """Fields [1, N] that are the same in every row and come before the picture."""
        ids = [self.codec.bos, *([self.codec.image_start] if self.marks else ())]
        return {"head": text_table([[(ids, False)]], self.codec.pad, self.rooms[0]).take(np.zeros(1, np.int64))}

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `rest` [1, N] as far as it is given, to be continued: <|im_end|> and the question.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        ids = [*([self.codec.image_end] if self.marks else ()), *(self.codec.encode(words) if words else ())]
        return prompt_field(words, ids, self.rooms[1], self.codec.pad)


def _unled(parts: list[Part]) -> list[Part]:
    """Without a picture nothing stands before the first token of the rest that could predict it."""
    first = next((i for i, (ids, _) in enumerate(parts) if ids), len(parts))
    if first == len(parts):
        return parts
    ids, target = parts[first]
    return [*parts[:first], (ids[:1], False), (ids[1:], target), *parts[first + 1 :]]
