"""A text alone: `<s> words </s>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.example import BadRow, Example, Row, Source, texts_of
from src.data.templates._base import Request, Template, segment_options
from src.data.words import MASK, Words, check_too_long, encode, encode_masked, room_for, text_codec
from src.interfaces import Field


class Text(Template):
    """The name `text.sentence`, of which every token after <s> is a target. Nothing is random.

    length    tokens of the text with its two special ones; None: of the longest one of the source, which must know them
    value     the value of the example that is the text
    given     a value that the text begins with: its tokens are given, and only what follows is a target; "": none
    too_long  what happens to longer texts: `cut` (their beginning is used) or `skip` (they are bad rows)
    text      the field
    segment   of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`
    filled    the text goes on with </s> up to the end of its noisy block: diffusion makes whole blocks, and has to
              learn where a text ends inside one
    """

    optional = ("masked",)
    conditional = False

    def __init__(
        self,
        length: int | None = None,
        *,
        value: str = "text",
        given: str = "",
        too_long: str = "cut",
        text: str = "text",
        segment: Mapping[str, Any] | None = None,
        filled: bool = False,
    ):
        check_too_long(too_long)
        self.length, self.value, self.too_long, self.text = length, value, too_long, text
        self.given = given
        self.needs, self.answers, self.fill = (value,), (value,), (f"{text}.sentence",)
        self.options, self.filled = segment_options(segment, blocks="causal"), filled

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.codec = text_codec(fields, self.text)
        room = room_for(source, self.value, lambda text: 2 + len(self.codec.encode(text)), self.length, None, 0)
        self.columns = (Words(f"{self.text}.sentence", self.codec, room, **self.options),)

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`. A prompt without the text may have its beginning, "prompt", or the whole text with
        `<mask>` for each token that is to be filled in, "masked"."""
        (words,) = self.columns
        if request.prompt and example.get("masked") is not None:
            return words.row(self._masked(words, example))
        make = request.prompt and example.get(self.value) is None
        text = example.get("prompt", "") if make else texts_of(example, self.value)[0]
        skip = request.prompt or self.too_long == "skip"
        ids, whole = encode(self.codec, text, words.length - 2, example.where, skip=skip)
        given = 0 if make or not self.given else self._given(example, ids)
        parts = [([self.codec.bos], False), (ids[:given], False), (ids[given:], True)]
        if whole and not make:
            parts.append(([self.codec.eos], True))
            parts = words.filled(parts) if self.filled else parts
        return words.row(parts, prompt=request.prompt, make=make)

    def _given(self, example: Example, ids: list[int]) -> int:
        """The number of given tokens. Raises BadRow unless the text begins with them."""
        (text,) = texts_of(example, self.given)[:1]
        given, _ = encode(self.codec, text, len(ids), example.where)
        if given != ids[: len(given)] or len(given) == len(ids):
            raise BadRow(f"the text does not go on behind its {self.given}", example.where, text)
        return len(given)

    def _masked(self, words: Words, example: Example) -> list[tuple[list[int], bool]]:
        """The parts of a text that is to be filled in. Raises BadRow for one without a `<mask>`."""
        text = example["masked"]
        if not isinstance(text, str) or MASK not in text or "prompt" in example:
            raise BadRow(f"a masked text has no {MASK}, or there is a prompt beside it", example.where, text)
        parts = encode_masked(self.codec, text, words.length - 2, example.where)
        parts = [([self.codec.bos], False), *parts, ([self.codec.eos], False)]
        return [*parts, (words.filled(parts)[-1][0], False)] if self.filled else parts
