"""A class that conditions the whole row, and an image (SiT, DiT): no text."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.data.example import Example, Row, Source, label_of
from src.data.images import Images
from src.data.templates._base import Request, Template, segment_options
from src.data.words import field_of
from src.interfaces import Batch, Field


class ClassLabel(Template):
    """`Batch.cond["label"]` [B] and the name `image` (made). The uniform number is drop.

    drop          probability that the class of a training row is replaced by the null class, for classifier-free
                  guidance (Ho & Salimans 2022)
    buckets       grids (rows, columns) of tokens, the first one the field's: images keep about their aspect ratio
    label, image  fields
    segment       of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`
    """

    draws = 1
    needs, answers = ("label", "image"), ("image",)

    def __init__(
        self,
        *,
        drop: float = 0.1,
        label: str = "label",
        image: str = "image",
        segment: Mapping[str, Any] | None = None,
        buckets: Sequence[Sequence[int]] = (),
    ):
        self.drop, self.label, self.image, self.fill = drop, label, image, (image,)
        options = segment_options(segment, blocks="bidirectional", role="noisy")
        self.options = options | {"buckets": buckets}

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.classes = field_of(fields, self.label, "label").codec.host
        made = Images(self.image, field_of(fields, self.image, "image"), source, made=True, **self.options)
        self.columns = (made,)

    def check(self, source: Source) -> None:
        """Also refuses a source of another number of classes, before the first row."""
        super().check(source)
        found: Any = ()
        with contextlib.suppress(FileNotFoundError):  # numpy files may lack the names
            found = getattr(source, "classes", ())
        if found and len(found) != self.classes.count:
            raise ValueError(
                f"the data have {len(found)} classes and fields.{self.label}.codec has count={self.classes.count}: set"
                " it to theirs, or give the source a file of names that has them all"
            )

    def row(self, example: Example, request: Request) -> Row:
        """See `Template.row`. A prompt without a label has the null class."""
        (image,) = self.columns
        dropped = request.null or (request.prompt and example.get("label") is None)
        label = self.classes.null if dropped else label_of(example, self.classes.count)
        if request.uniforms is not None and request.uniforms[0] < self.drop:
            label = self.classes.null
        row = {self.label: np.asarray(label, np.int32)}
        if request.prompt and example.get("image") is None:
            return row | image.absent(True, example.get("grid"))
        return row | image.row(example.get("image"), example.where, prompt=request.prompt)

    def invented_question(self) -> Example:
        """See `Template.invented_question`."""
        return Example({"label": 0}, "made up")

    def blank(self) -> Row:
        """The arrays of a row that was refused."""
        return super().blank() | {self.label: np.asarray(0, np.int32)}

    def invent(self, rng: np.random.Generator, number: int) -> Row:
        """The arrays of a random row, null classes among them."""
        label = rng.integers(0, self.classes.count + 1, dtype=np.int32)
        return super().invent(rng, number) | {self.label: np.asarray(label)}

    def collate(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """The batch of stacked rows."""
        return super().collate(rows).replace(cond={self.label: rows[self.label]})
