"""Documents of text and images as spans of tokens: what the lines of a file say, and how much of it a row takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from src.data.example import BadRow, Example, turns_of
from src.data.told_once import tell_image, tell_special
from src.data.words import CHARACTERS

ROLES = {"generate": "image", "understand": "vision"}  # and what such images are called here


class Part(NamedTuple):
    """A text, or an image that is made (`image`) or only read (`vision`).

    loss   whether the tokens of a text are targets; of an image its first token, <|im_start|>
    """

    kind: str
    value: Any
    loss: bool


Turn = Sequence[Part]  # <s> parts </s>


class Room(NamedTuple):
    """What a row has: slots, images that are made, and images that are only read."""

    slots: int
    images: int = 0
    visions: int = 0


class Spans(NamedTuple):
    """An example, slot by slot, and its images.

    ids      of every slot; those of images hold the codec's `image`
    kind     what is there: PADDING (in front of an image, for its lead), TEXT, WORDS (of a text, not special) or IMAGE
    loss     whether the slot is a target of a text objective
    images   by kind: (image, first slot) of each
    whole    whether nothing was cut
    """

    ids: np.ndarray
    kind: np.ndarray
    loss: np.ndarray
    images: dict[str, list[tuple[Any, int]]]
    whole: bool

    @property
    def size(self) -> tuple[int, int, int]:
        """What it takes of a `Room`."""
        return len(self.ids), len(self.images["image"]), len(self.images["vision"])


PADDING, TEXT, WORDS, IMAGE = range(4)


def turns_of_example(example: Example) -> list[Turn]:
    """The turns of a document, which has one, or of a chat. Raises BadRow."""
    return document(example) if "parts" in example or "turns" not in example else chat(example)


def document(example: Example) -> list[Turn]:
    """The one turn of {"parts": [{"text": "…", "loss": true}, {"image": …, "role": "generate"}, …]}.

    `loss` is true by default, but for images to `understand`; `role` is `generate` by default. Raises BadRow.
    """
    parts = example.get("parts")
    if not isinstance(parts, list) or not parts:
        raise BadRow("there are no parts", example.where)
    return [[_part(part, f"part {i + 1}", example.where) for i, part in enumerate(parts)]]


def _part(told: Any, which: str, where: str) -> Part:
    if not isinstance(told, dict) or ("text" in told) == ("image" in told):
        raise BadRow("a part is neither a text nor an image", where, which)
    text = "text" in told
    unknown = sorted(told.keys() - ({"text", "loss"} if text else {"image", "role", "loss"}))
    if unknown:
        raise BadRow("a part has an unknown key", where, f"{which}: {unknown[0]!r}")
    role = told.get("role", "generate")
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow("the role of an image is neither generate nor understand", where, f"{which}: {role!r}")
    loss = told.get("loss", text or role == "generate")
    if not isinstance(loss, bool):
        raise BadRow("loss is neither true nor false", where, which)
    if text and (not isinstance(told["text"], str) or not told["text"]):
        raise BadRow("a text is empty or no text", where, which)
    return Part("text", told["text"], loss) if text else Part(ROLES[role], told["image"], loss)


def chat(example: Example) -> list[Turn]:
    """A turn for each question with its answer of {"turns": ["question", "answer", …]}, with the loss on the answers.

    Raises BadRow.
    """
    said = turns_of(example)
    tell_image(example, example.where)
    return [[Part("text", q, False), Part("text", a, True)] for q, a in zip(said[::2], said[1::2], strict=True)]


def encode(turns: Sequence[Turn], codec: Any, room: Room, where: str) -> tuple[list[Turn], bool]:
    """The turns with the ids of their texts in place of these, and whether they are all there: far more characters than
    a row may take are not looked at. Raises BadRow for a text that cannot be encoded."""
    out, left = [], CHARACTERS * room.slots
    for turn in turns:
        parts = []
        for part in turn:
            value = part.value
            if part.kind == "text":  # a text of a megabyte is cut before it costs anything
                value, left = value[: max(left, 0)], left - len(value)
                tell_special(value, where)
                try:
                    value = codec.encode(value)
                except ValueError as error:
                    raise BadRow("a text cannot be encoded", where, error) from error
            parts.append(part._replace(value=value))
        out.append(parts)
        if left < 0:
            break
    return out, left >= 0


def lay_out(turns: Sequence[Turn], codec: Any, room: Room, lengths: dict[str, int]) -> Spans:
    """As much of the turns as a row takes: texts end anywhere, images are whole or not there.

        <s> words <|im_start|> (lead) image <|im_end|> words <|im_start|> (lead) vision <|im_end|> … </s>

    turns     of encoded texts; `lengths` has the tokens of an image by kind
    """
    ids: list[int] = []
    kind: list[int] = []
    loss: list[bool] = []
    images: dict[str, list[tuple[Any, int]]] = {"image": [], "vision": []}

    def add(new: Sequence[int], what: int, target: bool) -> None:
        new = new[: room.slots - len(ids)]
        ids.extend(new)
        kind.extend([what] * len(new))
        loss.extend([target] * len(new))

    def image(part: Part) -> bool:
        length = lengths.get(part.kind, 0)
        most = room.images if part.kind == "image" else room.visions
        if len(ids) + 3 + length > room.slots or len(images[part.kind]) == most:
            return False
        add([codec.image_start], TEXT, part.loss)
        add([codec.image], PADDING, False)
        images[part.kind].append((part.value, len(ids)))
        add([codec.image] * length, IMAGE, False)
        add([codec.image_end], TEXT, False)
        return True

    def text(part: Part) -> bool:
        fits = len(part.value) <= room.slots - len(ids)
        add(part.value, WORDS, part.loss)
        return fits

    def turn(parts: Turn) -> bool:
        if len(ids) + 2 > room.slots:  # neither <s> alone
            return False
        add([codec.bos], TEXT, False)
        if not all((text if part.kind == "text" else image)(part) for part in parts):
            return False
        fits = len(ids) < room.slots
        add([codec.eos], TEXT, parts[-1].loss)
        return fits

    whole = all(turn(parts) for parts in turns)
    return Spans(np.asarray(ids, np.int32), np.asarray(kind, np.int8), np.asarray(loss, bool), images, whole)


def filled(found: Spans, count: int, eos: int, slots: int) -> Spans:
    """An example with so many further </s>, as far as a row takes them: targets, where its last token is one."""
    count = min(count, slots - len(found.ids))
    more = lambda array, value: np.concatenate([array, np.full(count, value, array.dtype)])
    return found._replace(ids=more(found.ids, eos), kind=more(found.kind, TEXT), loss=more(found.loss, found.loss[-1]))
