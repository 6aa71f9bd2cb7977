"""Layout with the same segments at the same slots in all rows, then the noisy copies of segments that have them.

    [lead] tokens · [lead] tokens · … · noisy copy · noisy copy

Padding lies inside a segment, at its end, where `valid` is False.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from src.interfaces import Batch, SequenceSpec
from src.sequence.segment import Segment

Orders = Int[Array | np.ndarray, "*B S"]
NEVER = 2**30  # write order of a noisy copy: above every read order


class Part(NamedTuple):
    """The lead, clean or noisy tokens of a segment, in slots start … start + length - 1."""

    segment: Segment
    copy: str
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class FixedLayout:
    """Every segment has the same slots in all rows. See `interfaces.Layout`.

    Raises ValueError for two segments with one name, and for a segment with both noisy copies and a lead.
    """

    segments: tuple[Segment, ...]

    def __post_init__(self):
        object.__setattr__(self, "segments", tuple(self.segments))
        names = [name for segment in self.segments for name in segment.names]
        if len(set(names)) != len(names):
            raise ValueError(f"layout has two segments with one name: {names}")
        if led := [s.name for s in self.segments if s.lead and s.role == "copies"]:
            raise ValueError(f"segment {led[0]} has noisy copies, so it cannot have leads (time tokens): set lead to 0")

    @property
    def length(self) -> int:
        """Slots of a row."""
        return sum(part.length for part in self.parts)

    @functools.cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts of a row, from left to right."""
        parts, slot = [], 0

        def add(segment: Segment, copy: str, length: int) -> None:
            nonlocal slot
            if length:
                parts.append(Part(segment, copy, slot, length))
                slot += length

        for segment in self.segments:
            add(segment, "lead", segment.lead)
            add(segment, "noisy" if segment.role == "noisy" else "clean", segment.length)
        for segment in self.segments:
            if segment.role == "copies":
                add(segment, "noisy", segment.length)
        return tuple(parts)

    def segment(self, name: str) -> Segment:
        """The segment of a name."""
        return next(s for s in self.segments if name in s.names)

    def part(self, name: str, copy: str) -> Part:
        """The part of a copy of a name; of a segment with one copy, that one."""
        found = [p for p in self.parts if name in p.segment.names and (p.copy == "lead") == (copy == "lead")]
        return next((p for p in found if p.copy == copy), found[0])

    def parts_of(self, name: str) -> int:
        """One."""
        return 1

    def with_leads(self, leads: Callable[[Segment], int]) -> FixedLayout:
        """The layout with `leads(segment)` tokens in front of each segment."""
        return FixedLayout(tuple(dataclasses.replace(s, lead=leads(s)) for s in self.segments))

    def only(self, keep: Callable[[Segment], bool]) -> FixedLayout:
        """The layout of some of the segments, concatenated."""
        return FixedLayout(tuple(s for s in self.segments if keep(s)))

    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`read`, `write`, `group`, numpy [S]; static, for block-sparse kernels."""
        read, write = np.arange(self.length), np.arange(self.length)
        group, groups = np.zeros(self.length, np.int64), 0
        for segment, copy, start, length in self.parts:
            if copy == "lead":
                continue
            here, first = slice(start, start + length), self.part(segment.name, "clean").start
            sizes = segment.sizes(noisy=copy == "noisy")
            begins = np.repeat(np.cumsum((0, *sizes[:-1])), sizes)
            ends = np.repeat(np.cumsum(sizes) - 1, sizes)
            blocks = segment.block_numbers(noisy=copy == "noisy")
            copied = first != start
            read[here] = first + begins - 1 if copied else first + ends
            write[here] = NEVER if copied else first + ends
            if segment.markov:
                read[here] = first - 1
            if copied or segment.markov:
                group[here] = groups + 1 + blocks
                groups += len(sizes)
        return read.astype(np.int32), write.astype(np.int32), group.astype(np.int32)

    def orders(self, batch: Batch) -> tuple[Orders, Orders, Orders]:
        """`static_orders`, or [B, S] if rows have blocks of their own (`Tokens.block`)."""
        orders = self.static_orders()
        differing = {s.name: batch.tokens[s.name].block for s in self.segments if s.name in batch.tokens}
        differing = {name: block for name, block in differing.items() if block is not None}
        if not differing:
            return orders
        rows = next(iter(differing.values())).shape[0]
        read, write, group = (jnp.broadcast_to(a, (rows, self.length)) for a in orders)
        for number, (name, block) in enumerate(differing.items()):
            first = self.part(name, "clean").start
            for part in self.parts:
                if name not in part.segment.names or part.copy == "lead":
                    continue
                here, copied = slice(part.start, part.start + part.length), part.start != first
                alone = copied or part.segment.markov
                read = read.at[:, here].set(first - 1 if part.segment.markov else first + block - copied)
                write = write.at[:, here].set(NEVER if copied else first + block)
                own = (2 * number + copied + 1) * NEVER // 128 + 1 + block  # different from all static groups
                group = group.at[:, here].set(own if alone else 0)
        return read, write, group

    def block_of(self, batch: Batch, name: str) -> Int[Array | np.ndarray, "*B N"]:
        """Number of the noisy block of each token: numpy [N], or [B, N] where rows have blocks of their own."""
        block = batch.tokens[name].block
        return self.segment(name).block_numbers(noisy=True) if block is None else block

    def valid(self, batch: Batch) -> Bool[Array, "B S"]:
        """Slots that are not padding; leads are valid if the first token of their segment is."""
        flags = {}
        for segment, copy, _, length in self.parts:
            valid = jnp.asarray(batch.tokens[segment.name].valid)
            flags[segment.name, copy] = valid[:, :1].repeat(length, axis=1) if copy == "lead" else valid
        return self.join(batch, flags)

    def spec(self, batch: Batch) -> SequenceSpec:
        """Orders, validity and positions; positions do not count padding, and a noisy token has its clean one's."""
        valid = self.valid(batch)
        positions = self._positions(valid)
        return SequenceSpec(*self.orders(batch), valid.astype(jnp.int32), positions, batch.relation)

    def _positions(self, valid: Bool[Array, "B S"]) -> Int[Array, "B S 1"]:
        """Number of valid tokens before each token."""
        copies = [p for p in self.parts if p.segment.role == "copies" and p.copy == "noisy"]
        inner = self.length - sum(p.length for p in copies)
        count = jnp.maximum(jnp.cumsum(valid[:, :inner].astype(jnp.int32), axis=1) - 1, 0)
        siblings = [self.part(p.segment.name, "clean") for p in copies]
        return jnp.concatenate([count, *(count[:, p.start : p.start + p.length] for p in siblings)], axis=1)[..., None]

    def join(
        self, batch: Batch, parts: Mapping[tuple[str, str], Array | np.ndarray], fill: int | float = 0
    ) -> Array | np.ndarray:
        """[B, S, …] from [B, N, …] by (name, copy), or numpy [S] from numpy [N]; names of one segment are summed, and
        missing ones are `fill`."""
        found = []
        for segment, copy, _, length in self.parts:
            given = [parts[name, copy] for name in segment.names if (name, copy) in parts]
            found.append(sum(given[1:], given[0]) if given else length)
        like = next(a for a in found if not isinstance(a, int))
        lead = () if like.ndim == 1 else like.shape[:1]
        numpy = all(isinstance(a, int | np.ndarray) for a in found)
        module = np if numpy else jnp
        full = lambda n: module.full((*lead, n, *like.shape[len(lead) + 1 :]), fill, like.dtype)
        return module.concatenate([full(a) if isinstance(a, int) else a for a in found], axis=len(lead))

    def take(self, batch: Batch, sequence: Array, name: str, copy: str = "clean") -> Array:
        """The values of `sequence` at the tokens of a copy of a name."""
        part = self.part(name, copy)
        return sequence[:, part.start : part.start + part.length]

    def before(self, batch: Batch, sequence: Array, name: str) -> tuple[Array, Bool[Array, "B N"]]:
        """State before each token (before the first, of the last valid one in the row), and whether it exists."""
        part, valid = self.part(name, "clean"), self.valid(batch)
        inside = slice(part.start, part.start + part.length - 1)
        earlier = valid[:, : part.start]
        if not part.start:
            first, some = jnp.zeros_like(sequence[:, :1]), jnp.zeros_like(valid[:, :1])
        else:
            last = jnp.max(jnp.where(earlier, jnp.arange(part.start), 0), axis=1)
            here = (jnp.arange(part.start) == last[:, None]).reshape(*earlier.shape, *[1] * (sequence.ndim - 2))
            first = jnp.where(here, sequence[:, : part.start], 0).sum(axis=1, keepdims=True, dtype=sequence.dtype)
            some = earlier.any(axis=1, keepdims=True)
        states = jnp.concatenate([first, sequence[:, inside]], axis=1)
        return states, jnp.concatenate([some, valid[:, inside]], axis=1)
