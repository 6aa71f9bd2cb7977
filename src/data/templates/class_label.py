"""A class that conditions the whole row, and an image (SiT, DiT): no text."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.data.example import BadRow, Example, Row, Source, label_of
from src.data.images import Images
from src.data.templates._base import Request, Template, segment_options
from src.data.words import field_of
from src.interfaces import Batch, Field


class ClassLabel(Template):
    """`Batch.cond["label"]` [B] and the name `image` (made). The uniform number is drop.

    drop          probability that the class of a training row is replaced by the null class, for classifier-free
                  guidance (Ho & Salimans 2022)
    buckets       grids (rows, columns) of tokens, the first one the field's: images keep about their aspect ratio
    given         first tokens of the image, whole rows, that are given and no targets: frames of a clip that lie one
                  below the other. A prompt has them as `past` [rows, w, C]. The source has arrays
    label, image  fields
    segment       of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`
    """

    draws = 1
    needs, answers = ("label", "image"), ("image",)

    def __init__(
        self,
        *,
        drop: float = 0.1,
        given: int = 0,
        label: str = "label",
        image: str = "image",
        segment: Mapping[str, Any] | None = None,
        buckets: Sequence[Sequence[int]] = (),
    ):
        self.drop, self.label, self.image, self.fill = drop, label, image, (image,)
        options = segment_options(segment, blocks="bidirectional", role="noisy")
        self.options = options | {"buckets": buckets, "given": given}
        self.given, self.optional = given, ("past",) if given else ()

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.classes = field_of(fields, self.label, "label").codec.host
        made = Images(self.image, field_of(fields, self.image, "image"), source, made=True, **self.options)
        self.columns = (made,)
        self.rows_given, rest = divmod(self.given * made.shape[0], made.count)
        if rest or (self.given and made.holds != "values"):
            raise ValueError(f"given={self.given} tokens are no whole rows of an image, or the source has no arrays")

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
            return row | (self._begun(example) if self.given else image.absent(True, example.get("grid")))
        return row | image.row(example.get("image"), example.where, prompt=request.prompt)

    def _begun(self, example: Example) -> Row:
        """The arrays of an image that begins with `past`. Raises BadRow where it is missing, or of another shape."""
        (image,) = self.columns
        past, shape = np.asarray(example.get("past", ())), (self.rows_given, *image.shape[1:])
        if past.shape != shape:
            raise BadRow(f"the past must be an array {shape}", example.where, f"{past.shape}")
        value = np.zeros(image.shape, image.dtype)
        value[: self.rows_given] = past
        return image.row(value, example.where)

    def question(self, example: Example) -> Example:
        """See `Template.question`."""
        asked = super().question(example)
        if self.given:
            asked["past"] = example["image"][: self.rows_given]
        return asked

    def invented_question(self) -> Example:
        """See `Template.invented_question`."""
        past = {"past": self.columns[0].made_up()[: self.rows_given]} if self.given else {}
        return Example({"label": 0} | past, "made up")

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
