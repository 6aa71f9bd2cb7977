"""Words, then an image: `<s> words <|im_start|>`, image, `<|im_end|> </s>`. Coarser tokens of it may come first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from src.data.example import Example, Row, Source, texts_of
from src.data.images import Images
from src.data.templates._base import ORDERS, Request, Template, segment_options
from src.data.words import ENDLESS, Words, check_too_long, encode, field_of, room_for, text_codec
from src.interfaces import Field


class CaptionToImage(Template):
    """Names `text.prompt`, `image` (made) and `text.tail`. Uniform numbers: which of several texts, drop, order.

    length       tokens of the prompt with its two special ones; None: of the longest text of the source, which must
                 know them. `row_length` instead: tokens of the whole row
    caption      the value of the example that is the text; of several texts a training row takes one at random, row i
                 of the ordered pass number i
    phrase       what is made of it ("a photo of {}")
    drop         probability that the words of a training row are left out, for classifier-free guidance
                 (Ho & Salimans 2022)
    too_long     what happens to longer texts: `cut` (their beginning is used) or `skip` (they are bad rows)
    text_loss    </s> is a target, too, and so are words and <|im_start|> where the words are not dropped
    newline      a line break stands before </s>, two tokens, as in MonoFormer's data (nothing sees it)
    buckets      grids (rows, columns) of tokens, the first one the field's: images keep about their aspect ratio. A
                 prompt may have the value `grid`, that of its image
    text, image  fields
    blocks       how the words see each other
    segment      of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`; and
                 `order`, `splits`, see `data.orders.Orders`
    coarse       fields of the same image in fewer tokens, made one after the other before `image`, with noisy copies
                 beside the clean tokens that it sees. A prompt may have one as the value of its name: it is given
    """

    draws = 2
    answers = ("image",)

    def __init__(
        self,
        length: int | None = None,
        *,
        row_length: int | None = None,
        caption: str = "caption",
        phrase: str = "{}",
        drop: float = 0.1,
        too_long: str = "cut",
        text_loss: bool = False,
        newline: bool = False,
        text: str = "text",
        image: str = "image",
        blocks: Any = "causal",
        segment: Mapping[str, Any] | None = None,
        buckets: Sequence[Sequence[int]] = (),
        coarse: Sequence[str] = (),
    ):
        check_too_long(too_long)
        check_phrase(phrase)
        self.length, self.row_length, self.caption, self.phrase = length, row_length, caption, phrase
        self.drop, self.too_long, self.text_loss, self.newline = drop, too_long, text_loss, newline
        self.blocks = blocks
        self.text, self.image, self.needs, self.fill = text, image, (caption, "image"), (image, *coarse)
        options = segment_options(segment, ORDERS, blocks="bidirectional", role="noisy")
        self.options = options | {"buckets": buckets}

    @property
    def targets(self) -> frozenset[str]:
        """The image, with `text_loss` the texts, too."""
        texts = (f"{self.text}.prompt", f"{self.text}.tail") if self.text_loss else ()
        return frozenset((*self.fill, *texts))

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        codec = text_codec(fields, self.text)
        self.codec, tail = codec, 4 if self.newline else 2
        image, *coarse = self.fill
        given = {"made": True, "blocks": "bidirectional", "role": "copies"}
        made = [Images(name, field_of(fields, name, "coarse"), source, **given) for name in coarse]
        made.append(Images(image, field_of(fields, image, "image"), source, made=True, **self.options))
        self.draws = type(self).draws + made[-1].draws
        room = self.room(source, sum(each.segment.length for each in made) + tail)
        words = Words(f"{self.text}.prompt", codec, room, blocks=self.blocks)
        self.columns = words, *made, Words(f"{self.text}.tail", codec, tail)

    def room(self, source: Source | None, fixed: int) -> int:
        """Tokens of the prompt beside `fixed` others; without a source as the config says. Raises ValueError."""
        frame = lambda text: 2 + len(self.codec.encode(self.phrase.format(text)))
        return room_for(source, self.caption, frame, self.length, self.row_length, fixed)

    def texts(self, example: Example) -> list[str]:
        """The texts that an example may be drawn from. Raises BadRow."""
        return [self.phrase.format(text) for text in texts_of(example, self.caption)]

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`. A prompt without text is one whose words were dropped."""
        codec, prompt, (words, *made, tail) = self.codec, request.prompt, self.columns
        parts = [([codec.bos], False), ([codec.image_start], False)]
        if not prompt or (self.has_text(example) and not request.null):
            texts = self.texts(example)  # also where they are dropped: a row without a text is a bad one
            number, dropped = self.which(request.index, len(texts)), False
            if request.uniforms is not None:
                number, dropped = int(request.uniforms[0] * len(texts)), request.uniforms[1] < self.drop
            skip = prompt or self.too_long == "skip"
            ids, _ = encode(codec, texts[number], words.length - 2, example.where, skip=skip, limit=ENDLESS)
            if not dropped:
                parts = [([codec.bos], False), (ids, self.text_loss), ([codec.image_start], self.text_loss)]
        between = codec.encode("\n") if self.newline else []
        end = [([codec.image_end, *between], False), ([codec.eos], self.text_loss)]
        row = words.row(parts, prompt=prompt) | tail.row(end, prompt=prompt)
        for image in made:
            row |= self._image(image, example, prompt)
        uniform = None if request.uniforms is None or not made[-1].draws else request.uniforms[2]
        return row | made[-1].ordered(request.index, prompt=prompt, uniform=uniform)

    def _image(self, image: Images, example: Example, prompt: bool) -> Row:
        """The arrays of the image, or of coarser tokens of it."""
        value, coarse = example.get("image"), image.name != self.image
        if prompt and value is None and coarse:
            value = example.get(image.name)
        if prompt and value is None:
            return image.absent(True, None if coarse else example.get("grid"))
        return image.row(value, example.where, prompt=prompt)

    def has_text(self, example: Example) -> bool:
        """Whether a prompt says what to draw."""
        return example.get(self.caption) is not None

    def which(self, index: int, count: int) -> int:
        """The text of a row in the ordered pass."""
        return index % count


def check_phrase(phrase: str) -> None:
    """Raises ValueError for a phrase without one place for the words."""
    rest = phrase.replace("{}", "", 1)
    if phrase == rest or set("{}") & set(rest):
        raise ValueError(f"phrase={phrase!r} has not one place for the words: write {{}} once: 'a photo of {{}}'")
