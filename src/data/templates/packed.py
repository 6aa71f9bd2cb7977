"""Documents of texts and images, or chats, packed into rows of one length (`sequence/packed.py`).

Before the first row all examples are read once, without their images, to learn how long they are; then it is decided
for good which of them share a row. So a row is a function of its number, and the position in the data is one integer
as ever. Nothing is left out silently: examples that cannot be used get a row of their own, where they are refused by
name (`BadRow`); those that are larger than a row are cut, or refused, and counted; an image that cannot be read spoils
its document, not the others of the row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from src.common.tree import listed
from src.data.example import BadRow, Example, Row, Source
from src.data.images import Images
from src.data.pipeline.reader import stack
from src.data.splits import example_of, numbers_of, rows_of
from src.data.templates import _spans as spans
from src.data.templates._base import Template, segment_options
from src.data.templates._packing_plan import Plan, measure, plan_rows
from src.data.templates._spans import Part, Room, Spans
from src.data.templates.chat import asked, parts_of, size_of, unanswered
from src.data.words import Words, check_lengths, check_too_long, encode, field_of, text_codec
from src.interfaces import Batch, Field, Layout, Packing, Tokens
from src.sequence.layout import FixedLayout
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment

KINDS = ("image", "vision")  # images that are made, and that are only read
Loaded = dict[str, list[Row]]  # by kind, the arrays of each of a document's images


class Packed(Template):
    """The names `text` [B, S] and, where a row has room for such images, `image` (made) and `vision` [B, M, N]. Texts
    of documents are targets unless they say otherwise, of chats the answers. Examples have `parts`, or `turns`.

    length         slots of a row
    images         images of a row that are made, and `visions` that are only read
    too_long       what happens to examples that are larger than a row: `cut` or `skip` (they are bad rows)
    drop           probability that the words of a document with images that are made are left out in training, for
                   classifier-free guidance; one uniform number for each image of a row
    prompt_length  tokens of a prompt for an image
    buckets        grids (rows, columns) of tokens of the images that are made, the first one the field's
    segment        of the images that are made: `blocks`; `vision_blocks` of the others
    text_segment   of the text: `role` and `noisy_blocks`, for rows without images
    filled         an example goes on with </s> up to the end of its noisy block, see `text`
    text, image, vision   fields

    A prompt is one example: of an image, "prompt", the words before it; of text alone, `turns` whose last one is a
    question, or "prompt", its beginning.
    """

    def __init__(
        self,
        length: int,
        *,
        images: int = 0,
        visions: int = 0,
        too_long: str = "cut",
        drop: float = 0.0,
        prompt_length: int = 64,
        buckets: Sequence[Sequence[int]] = (),
        segment: Mapping[str, Any] | None = None,
        vision_blocks: Any = "causal",
        text_segment: Mapping[str, Any] | None = None,
        filled: bool = False,
        text: str = "text",
        image: str = "image",
        vision: str = "vision",
    ):
        check_too_long(too_long)
        if min(length, prompt_length) < 3 or min(images, visions) < 0:
            raise ValueError(
                f"length={length}, prompt_length={prompt_length}, images={images}, visions={visions} is not possible:"
                " give at least 3 tokens, and no negative numbers"
            )
        check_lengths(length=length, prompt_length=prompt_length)
        self.room, self.too_long, self.drop = Room(length, images, visions), too_long, drop
        self.prompt_length, self.text, self.names = prompt_length, text, {"image": image, "vision": vision}
        self.options = segment_options(segment, blocks="bidirectional", role="noisy") | {"buckets": buckets}
        self.text_options, self.filled = segment_options(text_segment, blocks="causal"), filled
        self.vision_blocks, self.draws = vision_blocks, images if drop else 0
        self.fill = (image,) if images else (text,)
        self._plans: dict[str, Plan] = {}

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.codec = text_codec(fields, self.text)
        self.parts: dict[str, Images] = {}  # by kind
        for kind, most in zip(KINDS, self.room[1:], strict=True):
            if not most:
                continue
            name, made = self.names[kind], kind == "image"
            options = self.options if made else {"blocks": self.vision_blocks}
            of = {"made": made, "always": False, "encoded": made}
            part = Images(name, field_of(fields, name, kind), source, **of, **options)
            if part.count + 5 > self.room.slots:
                raise ValueError(
                    f"length={self.room.slots} has no room for one {name} and its 5 special tokens: give more"
                )
            self.parts[kind] = part
        self._lengths = {kind: part.count for kind, part in self.parts.items()}
        self.columns = tuple(self.parts.values())

    @property
    def layout(self) -> Layout:
        """Packed rows."""
        segments = (self._text, *(part.segment for part in self.parts.values()))
        most = tuple((part.name, self.room[1 + KINDS.index(kind)]) for kind, part in self.parts.items())
        return PackedLayout(segments, self.room.slots, most)

    @property
    def _text(self) -> Segment:
        return Segment((self.text,), self.room.slots, **self.text_options)

    def __getstate__(self) -> dict[str, Any]:
        # A worker process does not plan again.
        return {name: value for name, value in self.__dict__.items() if name != "_sizes"}

    def rows(self, source: Source, split: str) -> int:
        """Rows of a split, with those of bad examples. Raises as `Template.rows`."""
        if split not in self._plans:
            count = rows_of(source, split)
            for part in self.columns:
                part.check(source)
            numbers = numbers_of(source, split, np.arange(count))
            self._plans[split] = plan_rows(split, numbers, self._measured(source)[numbers], self.room)
        return len(self._plans[split])

    def _measured(self, source: Source) -> np.ndarray:
        """Sizes of all examples, see `measure`."""
        if "_sizes" not in self.__dict__:
            about = None
            if hasattr(source, "identity"):
                about = [source.identity(), self.codec.fingerprint(), list(self.room), self._lengths, self.too_long]
                about += [self._text.sizes(noisy=True)[0]] if self.filled else []
            self._sizes = measure(len(source), lambda number: self._spans(example_of(source, number)), about)
        return self._sizes

    def _spans(self, example: Example) -> Spans:
        """An example as far as a row takes it. Raises BadRow."""
        turns, whole = spans.encode(spans.turns_of_example(example), self.codec, self.room, example.where)
        found = spans.lay_out(turns, self.codec, self.room, self._lengths)
        whole = whole and found.whole
        if self.filled and whole:
            size = self._text.sizes(noisy=True)[0]
            found = spans.filled(found, -len(found.ids) % size, self.codec.eos, self.room.slots)
        if not whole and self.too_long == "skip":
            raise BadRow("the document is too long", example.where, f"more than {self.room}")
        if not found.loss.any() and not found.images["image"]:
            raise BadRow("nothing of it that has room in a row is a target", example.where, f"{self.room}")
        return found._replace(whole=whole)

    def read(self, source: Source, split: str, index: int, uniforms: np.ndarray | None) -> Row:
        """The row's arrays. Raises BadRow, with the row of the sound examples if there are some."""
        self.rows(source, split)
        sound: list[tuple[Spans, Loaded]] = []
        flaws: list[BadRow] = []
        for number in self._plans[split][index]:
            try:
                example = example_of(source, int(number))
                found = self._spans(example)
                sound.append((found, self._load(found, example.where)))
            except BadRow as flaw:
                flaws.append(flaw)
        row = self._row(sound, uniforms)
        if not flaws:
            return row
        more = f", and {len(flaws) - 1} more in its row: {listed([f.where for f in flaws[1:]])}"
        detail = flaws[0].detail + (more if len(flaws) > 1 else "")
        raise BadRow(flaws[0].reason, flaws[0].where, detail, rest=row if sound else None)

    def _load(self, found: Spans, where: str) -> Loaded:
        """A document's images. Raises BadRow."""
        return {kind: [part.row(image, where) for image, _ in found.images[kind]] for kind, part in self.parts.items()}

    def blank(self) -> Row:
        """A row without examples: of each slot its id, flags and the number of its example, from 1; of each image its
        arrays and its first slot, -1 where there is none."""
        slots = self.room.slots
        row = {f"{self.text}/ids": np.full(slots, self.codec.pad, np.int32), "segment": np.zeros(slots, np.int32)}
        row |= {f"{self.text}/{kind}": np.zeros(slots, bool) for kind in ("valid", "target")}
        for kind, part in self.parts.items():
            most = self.room[1 + KINDS.index(kind)]
            row |= stack([part.blank()] * most)
            row[f"{part.name}/begins"] = np.full(most, -1, np.int32)
        return row

    def _row(self, examples: Sequence[tuple[Spans, Loaded]], uniforms: np.ndarray | None) -> Row:
        """The arrays of a row that holds these examples."""
        row, at, count = self.blank(), 0, dict.fromkeys(KINDS, 0)
        for number, (found, loaded) in enumerate(examples):
            here = slice(at, at + len(found.ids))
            words = found.kind == spans.WORDS
            drawn = uniforms is not None and self.drop and found.images["image"]
            dropped = words & bool(drawn and uniforms[count["image"]] < self.drop)
            valid = (words | (found.kind == spans.TEXT)) & ~dropped
            follows = np.concatenate([[False], dropped[:-1]])  # nothing predicts it
            row[f"{self.text}/ids"][here], row[f"{self.text}/valid"][here] = found.ids, valid
            row[f"{self.text}/target"][here] = found.loss & valid & ~follows
            row["segment"][here] = number + 1
            for kind, part in self.parts.items():
                for (_, begin), arrays in zip(found.images[kind], loaded[kind], strict=True):
                    for name, values in (arrays | {f"{part.name}/begins": at + begin}).items():
                        row[name][count[kind]] = values
                    count[kind] += 1
            at += len(found.ids)
        return row

    def collate(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """The batch of stacked rows."""
        text = Tokens(*(rows[f"{self.text}/{kind}"] for kind in ("ids", "valid", "target")))
        tokens = {self.text: text} | {part.name: part.tokens(rows) for part in self.columns}
        begins = {part.name: rows[f"{part.name}/begins"] for part in self.columns}
        return Batch(tokens, packing=Packing(rows["segment"], begins))

    def invent(self, rng: np.random.Generator, number: int) -> Row:
        """A row of random examples of every kind."""
        return self._row([*self._invented(rng)], None)

    def _invented(self, rng: np.random.Generator) -> Iterator[tuple[Spans, Loaded]]:
        """Examples for one row: a text, all images, a text; until nothing has room."""
        room = self.room
        while room.slots >= 5:
            first, last = (Part("text", rng.integers(0, self.codec.vocab_size, n).tolist(), True) for n in (1, 3))
            images = [Part(k, None, False) for k, most in zip(KINDS, room[1:], strict=True) for _ in range(most)]
            found = spans.lay_out([[first, *images, last]], self.codec, room, self._lengths)
            loaded: Loaded = {}
            for kind, part in self.parts.items():
                loaded[kind] = [part.invent(rng, n, part.made) for n in range(len(found.images[kind]))]
            yield found, loaded
            room = Room(*(have - taken for have, taken in zip(room, found.size, strict=True)))

    def question(self, example: Example) -> Example:
        """The first text of a document, or, where no images are made, a chat without its last answer."""
        if "image" not in self.parts and "turns" in example:
            return unanswered(example)
        texts = [part.value for turn in spans.turns_of_example(example) for part in turn if part.kind == "text"]
        return Example({"prompt": texts[0] if texts else ""}, example.where)

    def prompt(self, examples: Sequence[Example], null: bool) -> tuple[Layout, Batch]:
        """One example to a row, with fixed places. Raises BadRow and ValueError."""
        image = self.parts.get("image")
        if image is None and self.parts:
            raise ValueError(f"documents with {self.names['vision']} cannot be completed: use a task of picture_chat")
        length = self.prompt_length if image else self.room.slots
        words = Words(self.text, self.codec, length, **({} if image else self.text_options))
        rows = [self._prompt_row(words, image, example, null) for example in examples]
        columns = [words] if image is None else [words, image]
        batch = Batch({column.name: column.tokens(stack(rows)) for column in columns})
        return FixedLayout(tuple(column.segment for column in columns)), batch

    def _prompt_row(self, words: Words, image: Images | None, example: Example, null: bool) -> Row:
        codec, where = self.codec, example.where
        if image is not None:
            ids, _ = encode(codec, example.get("prompt", ""), words.length - 2, where, skip=True)
            row = words.row([([codec.bos, *([] if null else ids), codec.image_start], False)])
            given = example.get("image")
            return row | (
                image.absent(True, example.get("grid")) if given is None else image.row(given, where, prompt=True)
            )
        turns = asked(example)
        parts, whole = parts_of(turns, codec, where, most=words.length)
        if not whole or size_of(parts) > words.length:
            raise BadRow("the text is too long", where, f"there is room for {words.length} tokens")
        return words.row(parts, prompt=True, make=len(turns) % 2 == 1)
