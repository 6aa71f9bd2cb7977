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

from src.common.tree import listed
from src.data import spans
from src.data.chats import UltraChat
from src.data.example import Example, Examples
from src.data.file_task import ExampleTask, given
from src.data.files.json_lines import JsonLines
from src.data.files.latent_shards import PICTURES, moments_of
from src.data.pictures import blank_image, check_channels, crop, fitted, image_field, path_of
from src.data.pipeline.bad_rows import BadRow
from src.data.plan import Plan, measure, plan_rows
from src.data.rows import image_tokens, prompt_field
from src.data.spans import Part, Room, Spans
from src.interfaces import Field, ImageField, PlaceField, TokenField
from src.sequence.layout import Layout, Segment
from src.sequence.packed import Document

FIELDS = ("image", "picture")
Loaded = dict[str, list[dict[str, np.ndarray]]]  # by field, of each of a document's images the arrays that a row keeps


class DocumentFiles:
    """The documents of a folder by number, in the order of the files' names and lines. Raises FileNotFoundError."""

    kind = "documents"

    def __init__(self, folder: epath.Path, names: str = "documents.jsonl"):
        self._folder = folder
        self._lines = JsonLines(folder, names, '{"parts": [{"text": "words"}, {"image": "a.png"}]} for each document')

    def __len__(self) -> int:
        return len(self._lines)

    def identity(self) -> list[str]:
        """What changes when the files do."""
        return self._lines.identity()

    def __getitem__(self, index: int) -> Example:
        told, where = self._lines[index]
        parts = told.get("parts") if isinstance(told.get("parts"), list) else ()
        names = [part["image"] for part in parts if isinstance(part, dict) and "image" in part]
        return Example(where, told, tuple(path_of(self._folder, name, where) for name in names))


class Documents(ExampleTask):
    """Rows of `length` slots with at most `images` images that are generated and `pictures` that are understood.

    size       height and width of the generated images, `channels` 3 (RGB), 1 (grey), or as many as moments have
    image_mode, picture_mode   how the tokens of an image see each other
    too_long   what happens to documents that are larger than a row: `cut` or `skip` (they are bad rows)
    drop       probability that the words of a document with generated images are left out in training, for guidance
    prompt     tokens of a prompt for sampling
    files      names of the files in the folder, with `*`
    records    a folder of shards that `tools.prepare` or `tools.latents` made, read instead of `folder`
    held_out   how many of the last documents are the split "test"

    An image takes its tokens, <|im_start|>, <|im_end|> and a slot for its time token.
    """

    name = "documents"
    targets = frozenset({"text"})
    files = "documents.jsonl"
    kind = "documents"
    parse = staticmethod(spans.document)

    def __init__(
        self,
        codec: Any,
        length: int,
        *,
        folder: str | os.PathLike[str] = "",
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
        records: str | os.PathLike[str] = "",
        held_out: int = 0,
    ):
        if too_long not in ("cut", "skip"):
            raise ValueError(f"too_long={too_long!r} is unknown: use cut or skip")
        super().__init__(records=records, held_out=held_out)
        check_channels(channels)
        if min(length, prompt) < 3 or min(images, pictures) < 0:
            raise ValueError(
                f"length={length}, prompt={prompt}, images={images}, pictures={pictures} is not possible: give at least"
                " 3 tokens, and no negative numbers"
            )
        if images and not size:
            raise ValueError("the documents have images to generate: give their size")
        if pictures and vision is None:
            raise ValueError("the documents have images to understand, but vision.name is empty: set vision.name")
        self.folder, self.codec, self.vision, self.drop = folder, codec, vision, drop
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
        long = [s.name for s in segments[1:] if s.length + 5 > length]
        if long:
            raise ValueError(f"length={length} has no room for one {long[0]} and its 5 special tokens: give more")

    def __getstate__(self) -> dict[str, Any]:
        # A worker process opens the files itself, but does not plan again.
        return {name: value for name, value in self.__dict__.items() if name not in ("examples", "_sizes")}

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

    def open(self) -> Examples:
        """The folder's documents."""
        return DocumentFiles(given(self.folder, "folder", self.name), self.files)

    def plan(self, split: str) -> Plan:
        """The rows of a split. Raises as `rows`."""
        if split not in self._plans:
            count = super().rows(split)
            numbers = np.arange(count) + (len(self.examples) - count if split == "test" else 0)
            self._plans[split] = plan_rows(f"{self.name}, split {split}", numbers, self._sizes[numbers], self.room)
        return self._plans[split]

    @functools.cached_property
    def _sizes(self) -> np.ndarray:
        options = [self.parse.__name__, list(self.room), self._lengths, self.too_long]
        about = [self.examples.identity(), self.codec.fingerprint(), *options]
        return measure(len(self.examples), lambda number: self._spans(number)[0], about)

    def rows(self, split: str) -> int:
        """Rows of the split, with those of bad documents.

        Raises FileNotFoundError if files are missing, ValueError if the split is empty or unknown.
        """
        return len(self.plan(split))

    def _spans(self, number: int) -> tuple[Spans, Example]:
        """A document as far as a row takes it, and as it is. Raises BadRow."""
        example = self.examples[number]
        where = example.where
        turns, whole = spans.encode(self.parse(example.told, where), self.codec, self.room, where)
        found = spans.lay_out(turns, self.codec, self.room, self._lengths)
        if not (whole and found.whole) and self.too_long == "skip":
            raise BadRow("the document is too long", where, f"more than {self.room}")
        return found._replace(whole=whole and found.whole), example

    def read(self, split: str, index: int) -> dict[str, np.ndarray]:
        """The row's arrays, see `blank`. Raises BadRow, with the row of the sound documents if there are some."""
        examples, flaws = [], []
        for number in self.plan(split)[index]:
            try:
                found, example = self._spans(int(number))
                examples.append((found, self._load(found, example)))
            except BadRow as flaw:
                flaws.append(flaw)
        row = self._row(examples)
        if flaws:
            more = f", and {len(flaws) - 1} more in its row: {listed([f.where for f in flaws[1:]])}"
            detail = flaws[0].detail + (more if len(flaws) > 1 else "")
            raise BadRow(flaws[0].reason, flaws[0].where, detail, rest=row if examples else None)
        return row

    def _load(self, found: Spans, example: Example) -> Loaded:
        """A document's images. Raises BadRow."""
        load = {"image": self._drawn, "picture": self._shown}
        return {f: [load[f](example.images[n], example.where) for n, _ in found.images[f]] for f in FIELDS}

    def _shown(self, image: epath.Path | bytes, where: str) -> dict[str, np.ndarray]:
        preprocess = lambda pixels: {"picture": self.vision.preprocess(pixels)}
        return fitted(image, where, self.vision.shape[2], preprocess)

    def _drawn(self, image: epath.Path | bytes, where: str) -> dict[str, np.ndarray]:
        if self.image_shape[2] not in PICTURES:
            return {"image": moments_of(image, self.image_shape, where)}
        return fitted(image, where, self.image_shape[2], self.fit)

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
            row |= {"image": np.stack([blank_image(self.image_shape)] * images)}
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
            fields["image"] = image_field(extra["image"]).replace(valid=begins["image"] >= 0)
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
            if self.image_shape[2] not in PICTURES:
                return {field: rng.normal(size=self.image_shape).astype(np.float16)}
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
    kind = "chats"
    files = "*.jsonl"
    parse = staticmethod(spans.chat)

    def open(self) -> Examples:
        """The folder's chats."""
        return UltraChat(given(self.folder, "folder", self.name), names=self.files)
