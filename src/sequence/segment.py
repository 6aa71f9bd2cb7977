"""A segment: a span of the sequence, and its attention mask."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Int

ROLES = ("clean", "noisy", "copies")
MODES = {"causal": 1, "bidirectional": 0}
Blocks = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Segment:
    """Names that share `length` tokens and their `valid`: their embeddings add up, and each has its own head.

    blocks         mask mode. 1 or "causal": each token sees the past; 0 or "bidirectional": all see all; n or
                   "block:<n>": each sees its block of n and the blocks before; (1, 4, 16): blocks of these sizes
    role           copies in the row. clean; noisy (an objective adds noise in place); copies: clean in place, and a
                   noisy copy at the row's end, which reads the clean blocks before its own
    noisy_blocks   blocks of the noisy copy, if they differ: next-token prediction beside block diffusion
    markov         a block sees itself and what lies before the segment, but not the blocks between
    lead           tokens in front that belong to the segment (a time token); each sees what lies before it

    Raises ValueError, with the segment's names, for other values.
    """

    names: tuple[str, ...] | str  # one name may be given alone
    length: int
    blocks: Any = 1
    role: str = "clean"
    noisy_blocks: Any = None
    markov: bool = False
    lead: int = 0

    def __post_init__(self):
        names = (self.names,) if isinstance(self.names, str) else tuple(self.names)
        object.__setattr__(self, "names", names)
        where = f"segment {', '.join(names)}"
        if self.role not in ROLES:
            raise ValueError(f"{where}: role {self.role!r} is unknown; use one of {', '.join(ROLES)}")
        if self.length < 1:
            raise ValueError(f"{where}: length {self.length} must be at least 1")
        object.__setattr__(self, "blocks", block_sizes(self.blocks, self.length, where))
        if self.noisy_blocks is not None:
            object.__setattr__(self, "noisy_blocks", block_sizes(self.noisy_blocks, self.length, where))

    @property
    def name(self) -> str:
        """The first of its names."""
        return self.names[0]

    def sizes(self, noisy: bool = False) -> tuple[int, ...]:
        """Sizes of the blocks of one copy, in order; they add up to `length`."""
        blocks = self.noisy_blocks if noisy and self.noisy_blocks is not None else self.blocks
        if isinstance(blocks, tuple):
            return blocks
        size = blocks or self.length
        whole, rest = divmod(self.length, size)
        return (size,) * whole + ((rest,) if rest else ())

    def block_numbers(self, noisy: bool = False) -> Int[np.ndarray, " N"]:
        """Number of the block of each token of one copy."""
        sizes = self.sizes(noisy)
        return np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)


def block_sizes(mode: Any, length: int, where: str) -> Blocks:
    """A mask mode as a number, or as a tuple of block sizes. Raises ValueError for an unknown one."""
    if isinstance(mode, str):
        size = mode.removeprefix("block:")
        mode = MODES.get(mode, int(size) if size != mode and size.isdigit() and int(size) else mode)
    if isinstance(mode, list | tuple):
        if sum(mode) != length or min(mode, default=0) < 1:
            raise ValueError(f"{where}: blocks of {tuple(mode)} tokens do not add up to its {length}")
        return tuple(mode)
    if isinstance(mode, bool) or not isinstance(mode, int) or mode < 0:
        raise ValueError(f"{where}: mask mode {mode!r} is unknown; use causal, bidirectional, block:<size> or sizes")
    return mode
