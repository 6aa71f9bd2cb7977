"""A class, which conditions the whole row or is tokens in front, and an image (SiT, DiT, CausalFusion): no text."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from src.data.example import BadRow, Example, Row, Source, label_of
from src.data.images import Images
from src.data.templates._base import ORDERS, Request, Template, segment_options
from src.data.words import field_of
from src.interfaces import Batch, Field, Tokens
from src.sequence.segment import Segment


class ClassLabel(Template):
    """`Batch.cond["label"]` [B], or the name `label` where its codec has `tokens`, and the name `image` (made). Uniform
    numbers: drop, order.

    drop          probability that the class of a training row is replaced by the null class, for classifier-free
                  guidance (Ho & Salimans 2022)
    buckets       grids (rows, columns) of tokens, the first one the field's: images keep about their aspect ratio
    given         first tokens of the image, whole rows, that are given and no targets: frames of a clip that lie one
                  below the other. A prompt has them as `past` [rows, w, C]. The source has arrays
    label, image  fields
    segment       of the made one: `blocks`, `role`, `noisy_blocks`, `markov`, see `sequence.segment.Segment`; and
                  `order`, `splits`, see `data.orders.Orders`
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
        options = segment_options(segment, ORDERS, blocks="bidirectional", role="noisy")
        self.options = options | {"buckets": buckets, "given": given}
        self.given, self.optional = given, ("past",) if given else ()

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self.classes = field_of(fields, self.label, "label").codec.host
        made = Images(self.image, field_of(fields, self.image, "image"), source, made=True, **self.options)
        self.rows_given, rest = divmod(self.given * made.shape[0], made.count)
        if rest or (self.given and made.holds != "values"):
            raise ValueError(f"given={self.given} tokens are no whole rows of an image, or the source has no arrays")
        self.draws = type(self).draws + made.draws
        self.columns = (_ClassTokens(self.label, self.classes), made) if self.classes.tokens else (made,)

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
        image = self.columns[-1]
        dropped = request.null or (request.prompt and example.get("label") is None)
        label = self.classes.null if dropped else label_of(example, self.classes.count)
        if request.uniforms is not None and request.uniforms[0] < self.drop:
            label = self.classes.null
        uniform = None if request.uniforms is None or not image.draws else request.uniforms[1]
        row = {self.label: np.asarray(label, np.int32)}
        row |= image.ordered(request.index, prompt=request.prompt, uniform=uniform)
        if request.prompt and example.get("image") is None:
            return row | (self._begun(example) if self.given else image.absent(True, example.get("grid")))
        return row | image.row(example.get("image"), example.where, prompt=request.prompt)

    def _begun(self, example: Example) -> Row:
        """The arrays of an image that begins with `past`. Raises BadRow where it is missing, or of another shape."""
        image = self.columns[-1]
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
        past = {"past": self.columns[-1].made_up()[: self.rows_given]} if self.given else {}
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
        batch = super().collate(rows)
        return batch if self.classes.tokens else batch.replace(cond={self.label: rows[self.label]})


class _ClassTokens:
    """The class of a row as tokens that see each other: ids class · n … class · n + n - 1."""

    def __init__(self, name: str, classes: Any):
        self.name, self.count = name, classes.tokens
        self.segment = Segment((name,), self.count, "bidirectional")

    def check(self, source: Source) -> None:
        """Nothing of its own."""

    def blank(self) -> Row:
        """Nothing: the template has the class."""
        return {}

    def invent(self, rng: np.random.Generator, number: int, target: bool) -> Row:
        """Nothing: the template has the class."""
        return {}

    def tokens(self, rows: Mapping[str, np.ndarray]) -> Tokens:
        """The tokens of stacked rows, all given."""
        value = rows[self.name][..., None] * self.count + np.arange(self.count, dtype=np.int32)
        return Tokens(value.astype(np.int32), np.ones(value.shape, bool), np.zeros(value.shape, bool))
