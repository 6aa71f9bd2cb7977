"""Rows whose parts lie elsewhere in each row: documents with several images, and several examples in one row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import Batch, BucketField, ImageField, PlaceField, SequenceSpec, TokenField, View
from src.sequence.layout import Layout, Segment


@dataclasses.dataclass(frozen=True)
class Document(Layout):
    """Rows of `slots` slots that hold packed examples of text and images, each where the row's `PlaceField` says.

    segments   one text segment of `slots` tokens, and one segment for each image field, with the length and the mode of
               one of its images
    most       how many images M of a segment a row has room for, by name; 1 where it is not told
    time       whether the slot before each image is its time token. The slot is there in any case, so that rows do not
               depend on the network; without time tokens it is padding

    A slot is what an image covers, else a time token, else text. Order is the slot; the tokens of a bidirectional image
    are a group; examples do not see each other, and each begins at position 0. So an example gets what it would get in
    a row of its own.

    Raises ValueError unless there is one text segment of that length, and for modes but causal and bidirectional.
    """

    slots: int = 0
    most: tuple[tuple[str, int], ...] = ()
    time: bool = False

    def __post_init__(self):
        super().__post_init__()
        texts = [s for s in self.segments if s.kind == "text"]
        if len(texts) != 1 or texts[0].length != self.slots:
            raise ValueError(f"packed rows of {self.slots} slots need one text segment of that length, not {texts}")
        blocks = [s.name for s in self.segments if s.mode not in ("causal", "bidirectional")]
        if blocks:
            raise ValueError(f"segments {blocks} of packed rows have another mode than causal and bidirectional")

    @property
    def length(self) -> int:
        return self.slots

    @property
    def text(self) -> str:
        """Name of the text segment."""
        return self.named("text")[0]

    @property
    def images(self) -> list[Segment]:
        """The image segments, generated and understood."""
        return [s for s in self.segments if s.kind != "text"]

    def slices(self) -> dict[str, slice]:
        raise ValueError("the segments of packed rows have no fixed places: see the places of each row")

    def copies(self, name: str) -> int:
        """How many images of a segment a row has room for."""
        return dict(self.most).get(name, 1)

    def timed(self) -> Document:
        """The layout whose rows use their slots of time tokens."""
        return dataclasses.replace(self, time=True)

    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Orders and groups, numpy `[S]`, as far as they are the same in every row: those of text alone."""
        slots = np.arange(self.slots, dtype=np.int32)
        return slots, slots, np.zeros_like(slots)

    def owner(
        self, places: PlaceField, name: str, part: str = "patches"
    ) -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """For each slot the image of that segment that it belongs to, or -1, and its number among all of their tokens.

        part    `patches`, or `time`: the slots of the time tokens, one an image
        """
        begins, length = places.begins[name], self.segment(name).length
        if part == "time":
            begins, length = jnp.where(begins > 0, begins - 1, -1), 1
        into = jnp.arange(self.slots)[:, None] - begins[:, None]
        inside = (begins[:, None] >= 0) & (into >= 0) & (into < length)
        image = jnp.where(inside.any(-1), inside.argmax(-1), -1)
        token = jnp.where(inside, jnp.arange(begins.shape[1]) * length + into, 0).sum(-1)
        return image.astype(jnp.int32), token.astype(jnp.int32)

    def seen(self, text: Bool[Array, "B S"], places: PlaceField) -> Bool[Array, "B S"]:
        """Which slots are no padding; `text` says it of those that hold text."""
        for segment in self.images:
            text = text | (self.owner(places, segment.name)[0] >= 0)
            time = self.owner(places, segment.name, "time")[0] >= 0
            text = text | time if self.time else text & ~time
        return text & (places.segment > 0)

    def valid(self, by_segment: dict[str, Array], rows: int) -> Bool[Array, "B S"]:
        """What `seen` told the view of these rows."""
        return by_segment[self.text]

    def spec_of(self, valid: Bool[Array, "B S"], places: PlaceField) -> SequenceSpec:
        """SequenceSpec of these rows."""
        group, first = jnp.zeros(valid.shape, jnp.int32), 1
        for segment in self.images:
            if segment.mode == "bidirectional":
                image, _ = self.owner(places, segment.name)
                group = jnp.where(image >= 0, first + image, group)
                first += places.begins[segment.name].shape[1]
        slots = self.static_orders()[0]
        visible = jnp.where(valid, places.segment, 0)
        return SequenceSpec(slots, slots, group, visible, restarting(valid, places.segment))

    def states(self, sequence: Float[Array, "B S D"], places: PlaceField, name: str) -> Float[Array, "B M N D"]:
        """What a sequence has at the places of the images; of images that are not there, anything."""
        begins = places.begins[name]
        slots = jnp.clip(begins[..., None] + jnp.arange(self.segment(name).length), 0, self.slots - 1)
        found = jnp.take_along_axis(sequence, slots.reshape(len(begins), -1, 1), axis=1)
        return found.reshape(*slots.shape, -1)

    def before(
        self, sequence: Float[Array, "B S D"], valid: Bool[Array, "B S"], places: PlaceField
    ) -> tuple[Float[Array, "B S D"], Bool[Array, "B S"]]:
        """The state in the slot before each slot, and whether a token of the same example is there."""
        earlier = lambda a: jnp.pad(a, [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2))[:, :-1]
        return earlier(sequence), earlier(valid) & (earlier(places.segment) == places.segment)


def restarting(valid: Bool[Array, "B S"], segment: Int[Array, "B S"]) -> Int[Array, "B S 1"]:
    """Number of valid tokens before each token in its own example."""
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    first = segment != jnp.pad(segment, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    before = jax.lax.cummax(jnp.where(first, count - valid, 0), axis=1)
    return jnp.maximum(count - 1 - before, 0)[..., None]


def document_view(layout: Document, batch: Batch, encode: Callable[[Array], Array]) -> View:
    """`sequence.view.clean_view` of packed rows.

    Raises KeyError when the batch lacks a field of the layout, or its places.
    """
    missing = [s.name for s in layout.segments if s.name not in batch]
    if missing:
        raise KeyError(f"the batch has fields {sorted(batch)}, the layout also needs {missing}")
    places, seen = placed(layout, batch)
    inputs = {layout.text: batch[layout.text].ids}
    for segment in layout.images:
        values, there = batch[segment.name].values, places.begins[segment.name] >= 0
        if segment.kind == "image":
            values = encode(values.reshape(-1, *values.shape[2:]))
            values = values.reshape(*there.shape, *values.shape[1:])
        inputs[segment.name] = jnp.where(there.reshape(*there.shape, *[1] * (values.ndim - 2)), values, 0)
    grids = {name: field.grid for name, field in batch.items() if isinstance(field, BucketField)}
    return View(inputs, {layout.text: seen}, {}, places=places, grids=grids or None)


def placed(layout: Document, batch: Batch) -> tuple[PlaceField, Bool[Array, "B S"]]:
    """Where the images of these rows are that count, and which slots are no padding.

    Raises KeyError when the batch does not say it.
    """
    found = [field for field in batch.values() if isinstance(field, PlaceField)]
    if len(found) != 1:
        raise KeyError(f"the batch has fields {sorted(batch)}, packed rows also need their places")
    begins = {}
    for segment in layout.images:
        field: ImageField = batch[segment.name]
        begin = jnp.asarray(found[0].begins[segment.name])
        begins[segment.name] = begin if field.valid is None else jnp.where(field.valid, begin, -1)
    places = PlaceField(jnp.asarray(found[0].segment), begins)
    text: TokenField = batch[layout.text]
    return places, layout.seen(jnp.asarray(text.valid), places)
