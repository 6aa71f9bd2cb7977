"""The structures that travel between the floors: trees of arrays, and what describes them. Letters: `interfaces.py`."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from flax import struct
from jaxtyping import Array, Bool, Float, Int

PyTree = Any


@dataclasses.dataclass(frozen=True)
class FieldSpec:
    """What the tokens of a field are. `vocab` alone: a token is an id. `features` alone: a vector. Both: `features`
    numbers below `vocab` (counts, bits, code groups).

    grid   (N,) for text, whose length the templates say; (h, w) for an image, (F, h, w) for a video
    """

    grid: tuple[int, ...] = ()
    vocab: int | None = None
    features: int | None = None

    @property
    def tokens(self) -> int:
        """Tokens of the grid."""
        return math.prod(self.grid)


def row_of(name: str) -> str:
    """The field of a name: "text.question" -> "text". Several names may share one field."""
    return name.partition(".")[0]


@struct.dataclass
class Tokens:
    """One name of a batch. In rows that are packed `value` has the M parts of the name, [B, M, N, …].

    value    ids [B, N] or [B, N, P], vectors [B, N, P]; before the device codecs ran: what they take, e.g. [B, h, w, C]
    valid    a token is there; False: padding, which nobody sees
    target   it is to be made: trained on, or sampled; else it is given
    place    where each token lies: [B, N, axes] coordinates in the grid where rows differ; None: row-major
    block    number of each token's block, where rows differ
    """

    value: Array
    valid: Bool[Array, "*B N"]
    target: Bool[Array, "*B N"]
    place: Int[Array, "*B N axes"] | None = None
    block: Int[Array, "*B N"] | None = None


@struct.dataclass
class Packing:
    """Where things lie in packed rows (`sequence/packed.py`).

    segment  number of the packed example that each slot belongs to, from 1; 0: padding. An example's slots are
             neighbours
    begins   by name: the first slot of each of its M parts, -1 where there is none
    """

    segment: Int[Array, "*B S"]
    begins: dict[str, Int[Array, "*B M"]]


@struct.dataclass
class Batch:
    """The rows of one task.

    tokens    by name
    cond      conditions of a whole row, by field: class index [B], or numbers [B, C]
    relation  optional extra restriction of who sees whom (graphs, floor plans)
    """

    tokens: dict[str, Tokens]
    cond: dict[str, Array] = struct.field(default_factory=dict)
    packing: Packing | None = None
    relation: Bool[Array, "B S S"] | None = None


@struct.dataclass
class SequenceSpec:
    """Who sees whom. Arrays are `[S]` when every row is alike, `[B, S]` when they vary by row.

    visible(q, k) = segment_q == segment_k > 0  AND  (write_k <= read_q  OR  group_q == group_k > 0)  [AND relation_qk]
                    [AND (write_k > read_q - window  OR  group_q == group_k > 0)]

    read      highest order that a query may read
    write     order at which a key becomes readable
    group     > 0: members see each other whatever the order
    segment   id of the packed example, 0 = padding
    position  rotary position per axis
    relation  optional extra restriction (graphs, floor plans)
    contiguous  a promise: read and write are slot numbers, and the members of a group lie side by side, so that a query
                sees of its segment all up to its own slot, or up to the last of its group. Kernels need no mask then
    window    of queries: orders that one sees, the highest that it reads included; 0: all
    """

    read: Int[Array, "*B S"]
    write: Int[Array, "*B S"]
    group: Int[Array, "*B S"]
    segment: Int[Array, "*B S"]
    position: Int[Array, "*B S A"]
    relation: Bool[Array, "B S S"] | None = None
    contiguous: bool = struct.field(pytree_node=False, default=False)
    window: int = struct.field(pytree_node=False, default=0)


@struct.dataclass
class Corrupted:
    """x_t beside x_0, with the noise that made it and the time of each row or token, [B, 1] or [B, N]."""

    x0: PyTree
    xt: PyTree
    t: Float[Array, "B T"]
    noise: PyTree


@struct.dataclass
class LossTerm:
    """A sum and the number of things summed; the step divides, after adding over accumulation and devices.

    What is not `trained` is logged like a loss and adds nothing to it.
    """

    total: Array
    count: Array
    trained: bool = struct.field(pytree_node=False, default=True)

    def __add__(self, other: LossTerm) -> LossTerm:
        return LossTerm(self.total + other.total, self.count + other.count, self.trained)
