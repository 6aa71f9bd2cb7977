"""Packed rows: documents with several images, and several examples in one row, in the places of the row's packing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import Batch, SequenceSpec
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Rows of `slots` slots that hold packed examples. See `interfaces.Layout`.

    segments   first the one that fills the row (its tokens are [B, S], each in its own slot), then one for each name
               that has parts [B, M, N]: the length and the mode of one part
    most       how many parts M of a name a row has room for

    A slot is what a part covers, else the lead of a part, else a token of the first segment. A part that is not valid
    covers nothing. The slot in front of a part is there whether the part has a lead or not, so that rows do not depend
    on the network; without lead it is padding. Order is the slot; the tokens of a bidirectional part are a group;
    examples do not see each other, and each begins at position 0. So an example gets what it would get in a row of its
    own.

    Raises ValueError unless the first segment fills the row, for modes but causal and bidirectional, and for copies.
    """

    segments: tuple[Segment, ...]
    slots: int
    most: tuple[tuple[str, int], ...] = ()

    def __post_init__(self):
        first, *others = self.segments
        if first.length != self.slots or first.blocks != 1:
            raise ValueError(f"packed rows of {self.slots} slots need a causal first segment of that length")
        blocks = [s.name for s in others if s.blocks not in (0, 1) or s.markov]
        if blocks:
            raise ValueError(f"segments {blocks} of packed rows have another mode than causal and bidirectional")
        copied = [s.name for s in self.segments if s.role == "copies" or len(s.names) > 1]
        if copied:
            raise ValueError(f"segments {copied} of packed rows have noisy copies or several names: not in packed rows")

    @property
    def length(self) -> int:
        """Slots of a row."""
        return self.slots

    @property
    def inner(self) -> tuple[Segment, ...]:
        """The segments whose parts lie between the tokens of the first one."""
        return self.segments[1:]

    def segment(self, name: str) -> Segment:
        """The segment called `name`."""
        return next(s for s in self.segments if name in s.names)

    def parts_of(self, name: str) -> int:
        """How many parts of a name a row has room for."""
        return dict(self.most).get(name, 1)

    def with_leads(self, leads: Callable[[Segment], int]) -> PackedLayout:
        """The layout with leads of one token, or none, in front of the parts."""
        segments = tuple(dataclasses.replace(s, lead=min(leads(s), 1)) for s in self.inner)
        return dataclasses.replace(self, segments=(self.segments[0], *segments))

    def only(self, keep: Callable[[Segment], bool]) -> FixedLayout | PackedLayout:
        """The layout of some of the segments; the others' slots are padding."""
        return dataclasses.replace(self, segments=tuple(s for s in self.segments if s is self.segments[0] or keep(s)))

    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Those of the first segment alone."""
        slots = np.arange(self.slots, dtype=np.int32)
        return slots, slots, np.zeros_like(slots)

    def owner(self, batch: Batch, name: str, copy: str = "clean") -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """For each slot the part of that name that it belongs to, or -1, and its number among the tokens of all parts.

        copy   `lead`: the slots in front, one a part
        """
        begins, length = self._begins(batch, name), self.segment(name).length
        if copy == "lead":
            begins, length = jnp.where(begins > 0, begins - 1, -1), 1
        into = jnp.arange(self.slots)[:, None] - begins[:, None]
        inside = (begins[:, None] >= 0) & (into >= 0) & (into < length)
        part = jnp.where(inside.any(-1), inside.argmax(-1), -1)
        token = jnp.where(inside, jnp.arange(begins.shape[1]) * length + into, 0).sum(-1)
        return part.astype(jnp.int32), token.astype(jnp.int32)

    def _begins(self, batch: Batch, name: str) -> Int[Array, "B M"]:
        """First slots of the parts that are there, by their first tokens; -1 of the others."""
        there = jnp.asarray(batch.tokens[name].valid)[..., 0]
        return jnp.where(there, jnp.asarray(batch.packing.begins[name]), -1)

    def valid(self, batch: Batch) -> Bool[Array, "B S"]:
        """Which slots are no padding."""
        there = jnp.asarray(batch.tokens[self.segments[0].name].valid)
        for segment in self.inner:
            there = there | (self.owner(batch, segment.name)[0] >= 0)
            lead = self.owner(batch, segment.name, "lead")[0] >= 0
            there = there | lead if segment.lead else there & ~lead
        return there & (jnp.asarray(batch.packing.segment) > 0)

    def spec(self, batch: Batch) -> SequenceSpec:
        """Who sees whom in these rows."""
        valid, example = self.valid(batch), jnp.asarray(batch.packing.segment)
        group, first = jnp.zeros(valid.shape, jnp.int32), 1
        for segment in self.inner:
            if segment.blocks == 0:
                part, _ = self.owner(batch, segment.name)
                group = jnp.where(part >= 0, first + part, group)
                first += self.parts_of(segment.name)
        slots = self.static_orders()[0]
        return SequenceSpec(slots, slots, group, jnp.where(valid, example, 0), restarting(valid, example))

    def join(self, batch: Batch, parts: Mapping[tuple[str, str], Array | np.ndarray], fill: int | float = 0) -> Array:
        """[B, S, …] of [B, S, …] of the first segment, and of the parts' [B, M, N, …], or [M, N] for all rows."""
        rows = batch.packing.segment.shape[0]
        flat = {}
        for (name, copy), values in parts.items():
            values = jnp.asarray(values)
            if name == self.segments[0].name:
                flat[name, copy] = values
                continue
            values = (
                values
                if values.shape[0] == rows and values.ndim > 2
                else jnp.broadcast_to(values, (rows, *values.shape))
            )
            flat[name, copy] = values.reshape(rows, -1, *values.shape[3:])
        like = next(iter(flat.values()))
        first = (self.segments[0].name, "clean")
        base = flat.get(first, jnp.full((rows, self.slots, *like.shape[2:]), fill, like.dtype))
        source = jnp.broadcast_to(jnp.arange(self.slots), (rows, self.slots))  # of each slot's value among all of them
        found, total = [base], self.slots
        for segment in self.inner:
            for copy in ("noisy" if segment.role == "noisy" else "clean", "lead"):
                if (segment.name, copy) in flat:
                    part, token = self.owner(batch, segment.name, copy)
                    source = jnp.where(part >= 0, total + token, source)
                    found.append(flat[segment.name, copy])
                    total += found[-1].shape[1]
        index = source.reshape(rows, self.slots, *[1] * (like.ndim - 2))
        return jnp.take_along_axis(jnp.concatenate(found, axis=1), index, axis=1)

    def take(
        self, batch: Batch, sequence: Float[Array, "B S *D"], name: str, copy: str = "clean"
    ) -> Float[Array, "B M N *D"] | Float[Array, "B S *D"]:
        """The values of a sequence at the tokens of the parts; arbitrary values for absent parts."""
        if name == self.segments[0].name:
            return sequence
        begins = self._begins(batch, name)
        slots = jnp.clip(begins[..., None] + jnp.arange(self.segment(name).length), 0, self.slots - 1)
        rows = jnp.arange(begins.shape[0])[:, None, None]
        return sequence[rows, slots]

    def before(self, batch: Batch, sequence: Array, name: str) -> tuple[Array, Bool[Array, "B S"]]:
        """The state in the slot before each slot, and whether a token of the same example is there.

        Raises ValueError for a name whose tokens are parts: none of them is made token by token.
        """
        if name != self.segments[0].name:
            raise ValueError(f"{name} lies in parts of packed rows, which are not made token by token")
        valid, example = self.valid(batch), jnp.asarray(batch.packing.segment)
        earlier = lambda a: jnp.pad(a, [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2))[:, :-1]
        return earlier(sequence), earlier(valid) & (earlier(example) == example)


def restarting(valid: Bool[Array, "B S"], example: Int[Array, "B S"]) -> Int[Array, "B S 1"]:
    """Number of valid tokens before each token in its own example."""
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    first = example != jnp.pad(example, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    before = jax.lax.cummax(jnp.where(first, count - valid, 0), axis=1)
    return jnp.maximum(count - 1 - before, 0)[..., None]
