"""An image, then its caption: `<s> <|im_start|>`, image, `<|im_end|> caption </s>`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.example import Example, Row, Source, texts_of
from src.data.images import Images
from src.data.templates._base import Request, Template, segment_options
from src.data.templates.caption_to_image import check_phrase
from src.data.told_once import tell_once
from src.data.words import ENDLESS, Words, check_too_long, encode, field_of, room_for, text_codec
from src.interfaces import Field


class ImageToCaption(Template):
    """Names `text.head`, `image` and `text.caption` (made). Targets are the words and </s>, which a caption that was
    cut does not have. Nothing is random.

    length       tokens of the caption with its two special ones; None: of the longest text of the source, which must
                 know them. `row_length` instead: tokens of the whole row
    caption      the value of the example that is the text; of several texts the first
    phrase       what is made of it ("a photo of {}")
    too_long     what happens to longer texts: `cut` (their beginning is used) or `skip` (they are bad rows)
    text, image  fields
    blocks       how the tokens of the image see each other
    segment      of the caption: `blocks`, `role`, `noisy_blocks`, see `sequence.segment.Segment`
    filled       the caption goes on with </s> up to the end of its noisy block, see `Text`
    """

    conditional = False

    def __init__(
        self,
        length: int | None = None,
        *,
        row_length: int | None = None,
        caption: str = "caption",
        phrase: str = "{}",
        too_long: str = "cut",
        text: str = "text",
        image: str = "image",
        blocks: Any = "bidirectional",
        segment: Mapping[str, Any] | None = None,
        filled: bool = False,
    ):
        check_too_long(too_long)
        check_phrase(phrase)
        self.length, self.row_length, self.caption, self.phrase = length, row_length, caption, phrase
        self.too_long, self.text, self.image, self.blocks = too_long, text, image, blocks
        self.options, self.filled = segment_options(segment, blocks="causal"), filled
        self.needs, self.answers, self.fill = (caption, "image"), (caption,), (f"{text}.caption",)

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        codec = text_codec(fields, self.text)
        self.codec, self.tells = codec, not hasattr(source, "every")  # who knows all its texts puts the usual one first
        read = Images(self.image, field_of(fields, self.image, "image"), source, made=False, blocks=self.blocks)
        frame = lambda text: 2 + len(codec.encode(self.phrase.format(text)))
        room = room_for(source, self.caption, frame, self.length, self.row_length, read.segment.length + 2)
        words = Words(f"{self.text}.caption", codec, room, **self.options)
        self.columns = Words(f"{self.text}.head", codec, 2), read, words

    def invented_question(self) -> Example:
        """See `Template.invented_question`."""
        return Example({"image": self.columns[1].made_up()}, "made up")

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`. A prompt without a caption may have its beginning, "prompt"."""
        codec, (head, image, words) = self.codec, self.columns
        row = head.row([([codec.bos, codec.image_start], False)])
        row |= image.row(example.get("image"), example.where, prompt=request.prompt)
        make = request.prompt and example.get(self.caption) is None
        texts = [example.get("prompt", "")] if make else texts_of(example, self.caption)
        if len(texts) > 1 and self.tells:
            tell_once(f"of several texts under {self.caption!r} only the first is learned", example.where)
        text = texts[0] if make else self.phrase.format(texts[0])
        skip = request.prompt or self.too_long == "skip"
        ids, whole = encode(codec, text, words.length - 2, example.where, skip=skip, limit=ENDLESS)
        parts = [([codec.image_end], False), (ids, True)]
        if whole and not make:
            parts.append(([codec.eos], True))
            parts = words.filled(parts) if self.filled else parts
        return row | words.row(parts, prompt=request.prompt, make=make)
