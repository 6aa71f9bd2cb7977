"""Layouts: the order of the segments of a row, and the integer arrays that say how their tokens see each other."""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from src.interfaces import SequenceSpec

KINDS = ("text", "image", "vision", "time")


@dataclasses.dataclass(frozen=True)
class Segment:
    """A span of `length` tokens that holds the field `name`. Its `mode` is MonoFormer's mask-mode argument.

    mode: `causal` (each token sees the past), `bidirectional` (the tokens of the span also see each other),
    `block:<size>` (blocks of that size, bidirectional inside a block, causal between blocks).
    """

    name: str
    kind: str
    length: int
    mode: str = "causal"

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"segment {self.name!r}: kind {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.length < 1:
            raise ValueError(f"segment {self.name!r}: length {self.length} must be at least 1")
        self.orders(0, 1)  # refuses an unknown mode

    def orders(self, start: int, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Order `[n]` and group `[n]` of the span's tokens; `start` is its first slot, `index` > 0 its number."""
        slots = np.arange(start, start + self.length)
        if self.mode == "causal":
            return slots, np.zeros_like(slots)
        if self.mode == "bidirectional":
            return slots, np.full_like(slots, index)
        if self.mode.startswith("block:") and self.mode[6:].isdigit() and int(self.mode[6:]) > 0:
            size = int(self.mode[6:])
            last = start + ((slots - start) // size + 1) * size - 1
            return np.minimum(last, slots[-1]), np.zeros_like(slots)
        raise ValueError(
            f"segment {self.name!r}: mask mode {self.mode!r} is unknown; use causal, bidirectional or block:<size>"
        )


@dataclasses.dataclass(frozen=True)
class Layout:
    """Segments in their order. Every segment has a fixed place; padding lies inside the segments (`valid` False)."""

    segments: tuple[Segment, ...]

    def __post_init__(self):
        names = [s.name for s in self.segments]
        if len(set(names)) != len(names):
            raise ValueError(f"layout has two segments of one name: {names}")

    @property
    def length(self) -> int:
        return sum(s.length for s in self.segments)

    def slices(self) -> dict[str, slice]:
        """The place of each segment in the sequence, by name."""
        ends = np.cumsum([s.length for s in self.segments])
        return {s.name: slice(int(e) - s.length, int(e)) for s, e in zip(self.segments, ends, strict=True)}

    def segment(self, name: str) -> Segment:
        """The segment called `name`."""
        return next(s for s in self.segments if s.name == name)

    def named(self, kind: str) -> list[str]:
        """Names of the segments of one kind, in order."""
        return [s.name for s in self.segments if s.kind == kind]

    def timed(self) -> Layout:
        """The layout with one `time` token before each image, also those that are understood."""
        segments = []
        for segment in self.segments:
            if segment.kind in ("image", "vision"):
                segments.append(Segment(time_name(segment.name), "time", 1))
            segments.append(segment)
        return Layout(tuple(segments))

    def copies(self, name: str) -> int:
        """How many images of a segment a row has room for."""
        return 1

    def words(self) -> Layout:
        """The layout of the text alone, one segment behind the other."""
        return dataclasses.replace(self, segments=tuple(s for s in self.segments if s.kind == "text"))

    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """`read`, `write`, `group`, numpy `[S]`: known before any data, so that block-sparse kernels can be static."""
        slices = self.slices()
        pairs = [s.orders(slices[s.name].start, i + 1) for i, s in enumerate(self.segments)]
        order = np.concatenate([p[0] for p in pairs]).astype(np.int32)
        group = np.concatenate([p[1] for p in pairs]).astype(np.int32)
        return order, order, group

    def valid(self, by_segment: dict[str, Array], rows: int) -> Bool[Array, "B S"]:
        """Joins the `[B, N]` flags of the segments; a segment without flags is all valid."""
        parts = [by_segment.get(s.name, jnp.ones((rows, s.length), bool)) for s in self.segments]
        return jnp.concatenate(parts, axis=1)

    def spec(self, valid: Bool[Array, "B S"]) -> SequenceSpec:
        """SequenceSpec of rows with this layout. Padding is skipped by the rotary position, wherever it lies."""
        read, write, group = self.static_orders()
        return SequenceSpec(read, write, group, valid.astype(jnp.int32), positions(valid))


def positions(valid: Bool[Array, "B S"]) -> Int[Array, "B S 1"]:
    """Number of valid tokens before each token: what the position would be if the row had no padding."""
    return jnp.maximum(jnp.cumsum(valid.astype(jnp.int32), axis=1) - 1, 0)[..., None]


def with_time_tokens(layout: Layout) -> Layout:
    """The layout with one `time` token before each image, also those that are understood, at time 0 (MonoFormer's
    `add_before_image_tokens`)."""
    return layout.timed()


def time_name(image: str) -> str:
    """Name of the time token's segment that belongs to an image segment."""
    return f"{image}.time"
