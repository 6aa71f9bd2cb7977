"""A text alone: `<s> words </s>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.example import Example, Row, Source, texts_of
from src.data.templates._base import Request, Template, segment_options
from src.data.words import Words, check_too_long, encode, room_for, text_codec
from src.interfaces import Field


class Text(Template):
    """The name `text.sentence`, of which every token after <s> is a target. Nothing is random.

    length    tokens of the text with its two special ones; None: of the longest one of the source, which must know them
    value     the value of the example that is the text
    too_long  what happens to longer texts: `cut` (their beginning is used) or `skip` (they are bad rows)
    text      the field
    segment   of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`
    """

    def __init__(
        self,
        length: int | None = None,
        *,
        value: str = "text",
        too_long: str = "cut",
        text: str = "text",
        segment: Mapping[str, Any] | None = None,
    ):
        check_too_long(too_long)
        self.length, self.value, self.too_long, self.text = length, value, too_long, text
        self.needs, self.answers, self.fill = (value,), (value,), (f"{text}.sentence",)
        self.options = segment_options(segment, blocks="causal")

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.codec = text_codec(fields, self.text)
        room = room_for(source, self.value, lambda text: 2 + len(self.codec.encode(text)), self.length, None, 0)
        self.columns = (Words(f"{self.text}.sentence", self.codec, room, **self.options),)

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`. A prompt without the text may have its beginning, "prompt"."""
        (words,) = self.columns
        make = request.prompt and example.get(self.value) is None
        text = example.get("prompt", "") if make else texts_of(example, self.value)[0]
        skip = request.prompt or self.too_long == "skip"
        ids, whole = encode(self.codec, text, words.length - 2, example.where, skip=skip)
        parts = [([self.codec.bos], False), (ids, True)]
        if whole and not make:
            parts.append(([self.codec.eos], True))
        return words.row(parts, prompt=request.prompt, make=make)
