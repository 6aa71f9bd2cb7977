"""Layout of packed rows: several examples in one row, at the slots of the row's `Packing`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import Batch, SequenceSpec
from src.sequence.layout import NEVER, FixedLayout
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True)
class PackedLayout:
    """Rows of `slots` slots that hold packed examples. See `interfaces.Layout`.

    segments   first the one that fills the row (tokens [B, S], each in its own slot), then one for each name with parts
               [B, M, N]: length and mask mode of one part
    most       largest number of parts M in a row, by name

    A slot holds a token of a part, else the lead of a part, else a token of the first segment. Parts that are not valid
    have no slots. The slot before a part is reserved even without a lead, as padding, so that data do not depend on the
    network. Orders are slot numbers, and a bidirectional part is a group. Examples do not see each other, and positions
    start at 0 in each, so the network's output for an example is that of a row of its own.

    A first segment with noisy copies has them in as many slots behind the row. Their blocks begin anew with each
    example: a noisy token reads its own block, and the clean tokens of its own example before that.

    Raises ValueError unless the first segment fills the row, for modes but causal and bidirectional, and for copies
    beside parts, of parts, or in blocks of several sizes.
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
            raise ValueError(f"segments {blocks} of packed rows must be causal or bidirectional")
        copied = [s.name for s in others if s.role == "copies" or len(s.names) > 1]
        if copied:
            raise ValueError(f"segments {copied} have noisy copies or several names: not supported in packed rows")
        if first.role == "copies" and (others or isinstance(first.noisy_blocks, tuple) or first.markov):
            raise ValueError(
                f"segment {first.name} of packed rows has noisy copies: give it blocks of one size, and no other"
                " segments"
            )

    @property
    def length(self) -> int:
        """Slots of a row, with those of the noisy copies."""
        return self.slots * (2 if self._copied else 1)

    @property
    def _copied(self) -> bool:
        return self.segments[0].role == "copies"

    @property
    def inner(self) -> tuple[Segment, ...]:
        """The segments with parts."""
        return self.segments[1:]

    def segment(self, name: str) -> Segment:
        """The segment called `name`."""
        return next(s for s in self.segments if name in s.names)

    def parts_of(self, name: str) -> int:
        """Largest number of parts of a name in a row."""
        return dict(self.most).get(name, 1)

    def part(self, name: str, copy: str) -> NoReturn:
        """There is no one place. Raises ValueError."""
        raise ValueError(f"{name} lies where each packed row says; sampling needs rows with fixed places")

    def with_leads(self, leads: Callable[[Segment], int]) -> PackedLayout:
        """The layout with at most one lead token in front of each part."""
        segments = tuple(dataclasses.replace(s, lead=min(leads(s), 1)) for s in self.inner)
        return dataclasses.replace(self, segments=(self.segments[0], *segments))

    def only(self, keep: Callable[[Segment], bool]) -> FixedLayout | PackedLayout:
        """The layout of some of the segments; slots of the others are padding."""
        return dataclasses.replace(self, segments=tuple(s for s in self.segments if s is self.segments[0] or keep(s)))

    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Orders of the first segment alone, as of a row with one example."""
        if self._copied:
            return FixedLayout(self.segments).static_orders()
        slots = np.arange(self.slots, dtype=np.int32)
        return slots, slots, np.zeros_like(slots)

    def block_of(self, batch: Batch, name: str) -> Int[Array | np.ndarray, "*B N"]:
        """Number of the noisy block of each token in its row; of a part, in the part."""
        segment = self.segment(name)
        if segment is not self.segments[0]:
            return segment.block_numbers(noisy=True)
        return jnp.maximum(jnp.cumsum(self._begins_block(batch), axis=1) - 1, 0)

    def _begins_block(self, batch: Batch) -> Bool[Array, "B S"]:
        """Slots where a block of the first segment begins: each so many slots of an example."""
        size = self.segments[0].sizes(noisy=True)[0]
        return _number_in(jnp.asarray(batch.packing.segment)) % size == 0

    def owner(self, batch: Batch, name: str, copy: str = "clean") -> tuple[Int[Array, "B S"], Int[Array, "B S"]]:
        """For each slot, the index of the part of `name` that covers it, or -1, and of its token among all M · N.

        copy   `lead`: for the slots of leads instead, one for each part
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
        """First slot of each part; -1 for parts whose first token is not valid."""
        there = jnp.asarray(batch.tokens[name].valid)[..., 0]
        return jnp.where(there, jnp.asarray(batch.packing.begins[name]), -1)

    def valid(self, batch: Batch) -> Bool[Array, "B S"]:
        """Slots that are not padding."""
        there = jnp.asarray(batch.tokens[self.segments[0].name].valid)
        for segment in self.inner:
            there = there | (self.owner(batch, segment.name)[0] >= 0)
            lead = self.owner(batch, segment.name, "lead")[0] >= 0
            there = there | lead if segment.lead else there & ~lead
        there = there & (jnp.asarray(batch.packing.segment) > 0)
        return jnp.concatenate([there, there], axis=1) if self._copied else there

    def spec(self, batch: Batch) -> SequenceSpec:
        """Orders, groups, examples as segments, and positions of these rows."""
        valid, example = self.valid(batch)[:, : self.slots], jnp.asarray(batch.packing.segment)
        group, first = jnp.zeros(valid.shape, jnp.int32), 1
        for segment in self.inner:
            if segment.blocks == 0:
                part, _ = self.owner(batch, segment.name)
                group = jnp.where(part >= 0, first + part, group)
                first += self.parts_of(segment.name)
        slots = np.arange(self.slots, dtype=np.int32)
        segment, positions = jnp.where(valid, example, 0), restarting(valid, example)
        if not self._copied:
            return SequenceSpec(slots, slots, group, segment, positions, contiguous=True)
        begins = jax.lax.cummax(jnp.where(self._begins_block(batch), slots, 0), axis=1)
        slots = jnp.broadcast_to(slots, valid.shape)
        both = lambda clean, noisy: jnp.concatenate([clean, noisy], axis=1)
        read, write = both(slots, begins - 1), both(slots, jnp.full_like(slots, NEVER))
        return SequenceSpec(read, write, both(group, begins + 1), both(segment, segment), both(positions, positions))

    def join(self, batch: Batch, parts: Mapping[tuple[str, str], Array | np.ndarray], fill: int | float = 0) -> Array:
        """[B, S, …] from [B, S, …] of the first segment, or [S] for all rows, and [B, M, N, …] of parts, or [M, N].

        Without values of the first segment its slots are `fill`; a part without values has those of the first segment.
        """
        if self._copied:
            return self._join_copies(batch, parts, fill)
        rows, first = batch.packing.segment.shape[0], self.segments[0]
        flat = {}
        for (name, copy), values in parts.items():
            values = jnp.asarray(values)
            if values.ndim == (1 if name == first.name else 2):  # the same in all rows
                values = jnp.broadcast_to(values, (rows, *values.shape))
            flat[name, copy] = values if name == first.name else values.reshape(rows, -1, *values.shape[3:])
        like = next(iter(flat.values()))
        base = flat.get((first.name, _own_copy(first)))
        if base is None:
            base = jnp.full((rows, self.slots, *like.shape[2:]), fill, like.dtype)
        source = jnp.broadcast_to(jnp.arange(self.slots), (rows, self.slots))  # index into the concatenated values
        found, total = [base], self.slots
        for segment in self.inner:
            for copy in (_own_copy(segment), "lead"):
                if (segment.name, copy) in flat:
                    part, token = self.owner(batch, segment.name, copy)
                    source = jnp.where(part >= 0, total + token, source)
                    found.append(flat[segment.name, copy])
                    total += found[-1].shape[1]
        index = source.reshape(rows, self.slots, *[1] * (like.ndim - 2))
        return jnp.take_along_axis(jnp.concatenate(found, axis=1), index, axis=1)

    def _join_copies(
        self, batch: Batch, parts: Mapping[tuple[str, str], Array | np.ndarray], fill: int | float
    ) -> Array:
        """Both copies of the first segment side by side."""
        rows, name = batch.packing.segment.shape[0], self.segments[0].name
        given = {copy: jnp.asarray(parts[name, copy]) for copy in ("clean", "noisy") if (name, copy) in parts}
        given = {c: jnp.broadcast_to(a, (rows, *a.shape)) if a.ndim == 1 else a for c, a in given.items()}
        like = next(iter(given.values()))
        return jnp.concatenate([given.get(c, jnp.full_like(like, fill)) for c in ("clean", "noisy")], axis=1)

    def take(
        self, batch: Batch, sequence: Float[Array, "B S *D"], name: str, copy: str = "clean"
    ) -> Float[Array, "B M N *D"] | Float[Array, "B T *D"]:
        """The values of `sequence` at the tokens of the parts; arbitrary values for absent parts."""
        if name == self.segments[0].name:
            return sequence[:, self.slots :] if self._copied and copy == "noisy" else sequence[:, : self.slots]
        begins = self._begins(batch, name)
        slots = jnp.clip(begins[..., None] + jnp.arange(self.segment(name).length), 0, self.slots - 1)
        rows = jnp.arange(begins.shape[0])[:, None, None]
        return sequence[rows, slots]

    def before(self, batch: Batch, sequence: Array, name: str) -> tuple[Array, Bool[Array, "B T"]]:
        """State in the slot before each slot, and whether it holds a token of the same example.

        Raises ValueError for a name with parts, which have no next-token prediction.
        """
        if name != self.segments[0].name:
            raise ValueError(f"{name} has parts in packed rows, which cannot be predicted token by token")
        valid, example = self.valid(batch)[:, : self.slots], jnp.asarray(batch.packing.segment)
        sequence = sequence[:, : self.slots]
        earlier = lambda a: jnp.pad(a, [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2))[:, :-1]
        return earlier(sequence), earlier(valid) & (earlier(example) == example)


def _own_copy(segment: Segment) -> str:
    """The one copy that packed rows have of a segment."""
    return "noisy" if segment.role == "noisy" else "clean"


def _number_in(example: Int[Array, "B S"]) -> Int[Array, "B S"]:
    """Number of each slot in its own example."""
    slots = jnp.arange(example.shape[1])
    first = example != jnp.pad(example, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    return slots - jax.lax.cummax(jnp.where(first, slots, 0), axis=1)


def restarting(valid: Bool[Array, "B S"], example: Int[Array, "B S"]) -> Int[Array, "B S 1"]:
    """Number of valid tokens before each token in its own example."""
    count = jnp.cumsum(valid.astype(jnp.int32), axis=1)
    first = example != jnp.pad(example, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
    before = jax.lax.cummax(jnp.where(first, count - valid, 0), axis=1)
    return jnp.maximum(count - 1 - before, 0)[..., None]
