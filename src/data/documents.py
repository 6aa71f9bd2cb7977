"""Documents of texts and images, packed into rows of one length: `sequence.document.Document` is their layout.

The folder has `documents.jsonl` (or files of other names, in the order of these) with a line for each document,

    {"parts": [{"text": "A cat"}, {"image": "a/cat.png", "role": "generate"}, {"text": "sleeps.", "loss": false}]}

and the images, by paths below the folder. Before the first row all documents are read once, without their images, to
learn how long they are; then it is decided for good which of them share a row. So a row is a function of its number,
and the position in the data is one integer as ever. Nothing is left out silently: documents that cannot be used get a
row of their own, where they are refused by name (`BadRow`); those that are larger than a row are cut, or refused, and
counted; an image that cannot be read spoils its document, not the others of the row.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from etils import epath

from src.common.images import read_image
from src.common.inside import inside
from src.common.tree import listed
from src.data import spans
from src.data.ledger import BadRow
from src.data.lines import JsonLines
from src.data.pictures import crop
from src.data.plan import Plan, measure, plan_rows
from src.data.rows import RowTask, check_split, image_tokens, prompt_field
from src.data.spans import Part, Room, Spans
from src.interfaces import Field, ImageField, PlaceField, TokenField
from src.sequence.document import Document
from src.sequence.layout import Layout, Segment

FIELDS = ("image", "picture")
Loaded = dict[str, list[dict[str, np.ndarray]]]  # by field, of each of a document's images the arrays that a row keeps


class Documents(RowTask):
    """Rows of `length` slots with at most `images` images that are generated and `pictures` that are understood.

    size       height and width of the generated images, `channels` 3 (RGB) or 1 (grey)
    image_mode, picture_mode   how the tokens of an image see each other
    too_long   what happens to documents that are larger than a row: `cut` or `skip` (they are bad rows)
    drop       probability that the words of a document with generated images are left out in training, for guidance
    prompt     tokens of a prompt for sampling
    files      names of the files in the folder, with `*`
    held_out   how many of the last documents are the split "test"

    An image takes its tokens, <|im_start|>, <|im_end|> and, if it is generated, a slot for its time token.
    """

    name = "documents"
    targets = frozenset({"text"})
    files = "documents.jsonl"
    parse = staticmethod(spans.document)

    def __init__(
        self,
        folder: str | os.PathLike[str],
        codec: Any,
        length: int,
        *,
        images: int = 0,
        pictures: int = 0,
        size: int = 0,
        channels: int = 3,
        patch: int = 2,
        vision: Any = None,
        image_mode: str = "bidirectional",
        picture_mode: str = "causal",
        too_long: str = "cut",
        drop: float = 0.0,
        prompt: int = 64,
        files: str = "",
        held_out: int = 0,
    ):
        if too_long not in ("cut", "skip"):
            raise ValueError(f"too_long={too_long!r} is unknown: use cut or skip")
        if min(length, prompt) < 3 or min(images, pictures, held_out) < 0 or channels not in (1, 3):
            raise ValueError(
                f"length={length}, prompt={prompt}, images={images}, pictures={pictures}, held_out={held_out},"
                f" channels={channels} is not possible: give at least 3 tokens, 1 or 3 channels, no negative numbers"
            )
        if images and not size:
            raise ValueError("the documents have images to generate: give their size")
        if pictures and vision is None:
            raise ValueError("the documents have images to understand, but vision.name is empty: set vision.name")
        self.folder, self.codec, self.vision, self.drop, self.held_out = folder, codec, vision, drop, held_out
        self.room, self.too_long, self.files = Room(length, images, pictures), too_long, files or self.files
        self.image_shape = (size, size, channels) if images else None
        self.draws = images if drop else 0
        segments = [Segment("text", "text", length)]
        if images:
            segments.append(Segment("image", "image", image_tokens(size, size, patch), image_mode))
        if pictures:
            segments.append(Segment("picture", "vision", vision.tokens, picture_mode))
        self.segments = tuple(segments)
        self._lengths = {s.name: s.length for s in segments[1:]}
        self._prompt = prompt
        self._plans: dict[str, Plan] = {}
        long = [s.name for s in segments[1:] if s.length + 4 + (s.kind == "image") > length]
        if long:
            raise ValueError(f"length={length} has no room for one {long[0]} and its 4 special tokens: give more")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself, but does not plan again.
        return {name: value for name, value in self.__dict__.items() if name not in ("_lines", "_sizes")}

    @property
    def layout(self) -> Document:
        """Packed rows."""
        return Document(self.segments, self.room.slots, (("image", self.room.images), ("picture", self.room.pictures)))

    def sampled(self, name: str) -> Layout | None:
        """One example, without packing, whose segment `name` is generated after a prompt; None: there is no way."""
        kinds = {s.name: s for s in self.segments}
        if name == "image":
            return Layout((Segment("text", "text", self._prompt), kinds["image"]))
        return None if len(kinds) > 1 else Layout((Segment("text", "text", self._prompt),))

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `text` [1, N] for sampling: <s> words <|im_start|>, and without the last where no images are generated.

        Raises ValueError if the words have unknown characters or do not fit.
        """
        ids = [self.codec.bos, *(self.codec.encode(words) if words else ())]
        ids += [self.codec.image_start] * (self.image_shape is not None)
        return prompt_field(words, ids, self._prompt, self.codec.pad)

    @functools.cached_property
    def _lines(self) -> JsonLines:
        return JsonLines(epath.Path(self.folder), self.files)

    def plan(self, split: str) -> Plan:
        """The rows of a split. Raises as `rows`."""
        check_split(self.name, split)
        if split not in self._plans:
            total = len(self._lines)
            numbers = np.arange(total)
            numbers = numbers[total - self.held_out :] if split == "test" else numbers[: total - self.held_out]
            if not numbers.size or self.held_out > total:
                raise ValueError(
                    f"split {split!r} of {os.fspath(self.folder)!r} is empty: it has {total} documents and"
                    f" held_out={self.held_out} of them are for test: give more, or set another held_out"
                )
            self._plans[split] = plan_rows(f"{self.name}, split {split}", numbers, self._sizes[numbers], self.room)
        return self._plans[split]

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        options = [self.parse.__name__, list(self.room), self._lengths, self.too_long]
        return measure(len(self._lines), self._spans, [self._lines.identity(), self.codec.fingerprint(), *options])

    def rows(self, split: str) -> int:
        """Rows of the split, with those of bad documents.

        Raises FileNotFoundError if files are missing, ValueError if the split is empty or unknown.
        """
        return len(self.plan(split))

    def _spans(self, number: int) -> Spans:
        """A document without its images. Raises BadRow."""
        told, where = self._lines[number]
        turns, whole = spans.encode(self.parse(told, where), self.codec, self.room, where)
        found = spans.lay_out(turns, self.codec, self.room, self._lengths)
        if not (whole and found.whole) and self.too_long == "skip":
            raise BadRow("the document is too long", where, f"more than {self.room}")
        return found._replace(whole=whole and found.whole)

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's arrays, see `blank`. Raises BadRow, with the row of the sound documents if there are some."""
        examples, flaws = [], []
        for number in self.plan(split)[index]:
            try:
                found = self._spans(int(number))
                examples.append((found, self._load(found, self._lines.where(int(number)))))
            except BadRow as flaw:
                flaws.append(flaw)
        row = self._row(examples)
        if flaws:
            more = f", and {len(flaws) - 1} more in its row: {listed([f.where for f in flaws[1:]])}"
            detail = flaws[0].detail + (more if len(flaws) > 1 else "")
            raise BadRow(flaws[0].reason, flaws[0].where, detail, rest=row if examples else None)
        return row

    def _load(self, found: Spans, where: str) -> Loaded:
        """A document's images. Raises BadRow."""
        out: Loaded = {}
        for field in FIELDS:
            out[field] = []
            for name, _ in found.images[field]:
                try:
                    path = inside(self.folder, name)
                except ValueError as error:
                    raise BadRow("the name of an image is not allowed", where, error) from error
                try:
                    channels = self.image_shape[2] if field == "image" else self.vision.shape[2]
                    pixels = read_image(path, channels=channels)
                    shown = field == "picture"
                    out[field].append({field: self.vision.preprocess(pixels)} if shown else self.fit(pixels))
                except FileNotFoundError as error:
                    raise BadRow("an image is missing", where, path) from error
                except (ValueError, OSError) as error:
                    raise BadRow("an image cannot be read", where, error) from error
        return out

    def fit(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """What a row keeps of an image that is generated. Raises ValueError for an image that is too narrow."""
        return {"image": crop(pixels, self.image_shape[0])}

    def blank(self) -> dict[str, np.ndarray]:
        """A row without documents.

        ids, kind, loss, segment   `[S]`, see `Spans` and `PlaceField`
        owner                      `[S]`, for words in a document with generated images: 1 + number of the first one
        image, picture             `[M, h, w, C]`, and `…_begins` `[M]`
        """
        slots, images, pictures = self.room
        row = {"ids": np.full(slots, self.codec.pad, np.int32), "kind": np.zeros(slots, np.int8)}
        row |= {"loss": np.zeros(slots, bool), "segment": np.zeros(slots, np.int32), "owner": np.zeros(slots, np.int32)}
        if images:
            row |= {"image": np.zeros((images, *self.image_shape), np.uint8)}
        if pictures:
            row |= {"picture": np.zeros((pictures, *self.vision.shape), np.float32)}
        return row | {f"{f}_begins": np.full(len(row[f]), -1, np.int32) for f in FIELDS if f in row}

    def _row(self, examples: list[tuple[Spans, Loaded]]) -> dict[str, np.ndarray]:
        """The arrays of a row that holds these examples."""
        row, at, count = self.blank(), 0, dict.fromkeys(FIELDS, 0)
        for number, (found, loaded) in enumerate(examples):
            here = slice(at, at + len(found.ids))
            row["ids"][here], row["kind"][here], row["loss"][here] = found.ids, found.kind, found.loss
            row["segment"][here] = number + 1
            if found.images["image"]:
                row["owner"][here] = np.where(found.kind == spans.WORDS, 1 + count["image"], 0)
            for field in FIELDS:
                for (_, begin), arrays in zip(found.images[field], loaded[field], strict=True):
                    for name, values in (arrays | {f"{field}_begins": at + begin}).items():
                        row[name][count[field]] = values
                    count[field] += 1
            at += len(found.ids)
        return row

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows: `text`, `image`, `picture` as there are such, and `places`."""
        valid = (extra["kind"] == spans.TEXT) | (extra["kind"] == spans.WORDS)
        loss = extra["loss"].copy()
        if uniforms is not None and self.drop:
            left_out = np.pad(uniforms < self.drop, ((0, 0), (1, 0)))
            left_out = np.take_along_axis(left_out, extra["owner"], axis=1)
            valid &= ~left_out
            loss[:, 1:] &= ~left_out[:, :-1]  # nothing predicts what follows
        fields: dict[str, Field] = {"text": TokenField(extra["ids"], valid, loss & valid)}
        begins = {f: extra[f"{f}_begins"] for f in FIELDS if f in extra}
        if "image" in extra:
            values, there = extra["image"].astype(np.float32) / 127.5 - 1, begins["image"] >= 0
            fields["image"] = ImageField(values, there)
        if "picture" in extra:
            fields["picture"] = ImageField(extra["picture"], begins["picture"] >= 0)
        return fields | {"places": PlaceField(extra["segment"], begins)}

    def element_spec(self, batch: int) -> dict[str, Field]:
        """The fields of a batch as shapes and dtypes (jax.ShapeDtypeStruct), without touching any data."""
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct((batch, *a.shape[1:]), a.dtype), self._build([self.blank()]))

    def fake(self, batch: int, seed: int) -> dict[str, Field]:
        """Rows of random examples of every kind."""
        rng = np.random.default_rng(seed)
        return self._build([self._row([*self._invent(rng)]) for _ in range(batch)])

    def _build(self, rows: list[dict[str, np.ndarray]]) -> dict[str, Field]:
        return self.build("train", np.arange(len(rows)), None, {k: np.stack([row[k] for row in rows]) for k in rows[0]})

    def _invent(self, rng: np.random.Generator) -> Iterator[tuple[Spans, Loaded]]:
        """Examples for one row: a text, all images, a text; until nothing has room."""
        room = self.room

        def load(field: str) -> dict[str, np.ndarray]:
            if field == "picture":
                return {field: rng.normal(size=self.vision.shape).astype(np.float32)}
            return self.fit(rng.integers(0, 256, self.image_shape).astype(np.uint8))

        while room.slots >= 5:
            text = [Part("text", rng.integers(0, self.codec.vocab_size, n).tolist(), True) for n in (1, 3)]
            fields = [field for field, most in zip(FIELDS, room[1:], strict=True) for _ in range(most)]
            images = [Part(field, None, False) for field in fields]
            found = spans.lay_out([[text[0], *images, text[1]]], self.codec, room, self._lengths)
            yield found, {field: [load(field) for _ in found.images[field]] for field in FIELDS}
            room = Room(*(have - taken for have, taken in zip(room, found.size, strict=True)))


class Chats(Documents):
    """Conversations, several to a row: lines {"data": ["question", "answer", …]} (UltraChat), loss on all answers."""

    name = "chats"
    files = "*.jsonl"
    parse = staticmethod(spans.chat)
