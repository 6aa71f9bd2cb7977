"""The order in which the tokens of an image are made, and their blocks, where each row has its own."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
from jaxtyping import Float, Int

ORDERS = ("rows", "random")


@dataclasses.dataclass(frozen=True)
class Orders:
    """Order and blocks of the tokens of one row.

    order    rows: row by row of the grid; random: another permutation for each row
    splits   (): the segment's blocks; numbers of blocks, one of them at random for each row, in blocks of one size (of
             two neighbouring ones where it does not divide the tokens); or a decay: n blocks with a chance proportional
             to decay^(n - 1), with ends at random places (CausalFusion, Deng et al. 2024); or "shifted:<n>": blocks of
             n, the first of 1 to n tokens, as many as by chance (ARDiT, arXiv 2406.05551)

    Raises ValueError for an unknown order, and for splits that are neither.
    """

    order: str = "rows"
    splits: Any = ()

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order={self.order!r} is unknown; use one of {', '.join(ORDERS)}")
        if isinstance(self.splits, str):
            if self.shifted < 1:
                raise ValueError(
                    f"splits={self.splits!r} is unknown; use numbers of blocks, a decay, or shifted:<size>"
                )
        elif isinstance(self.splits, float):
            if not 0 < self.splits <= 1:
                raise ValueError(f"splits={self.splits}: a decay lies above 0 and is at most 1")
        elif isinstance(self.splits, int) or not all(type(n) is int and n > 0 for n in self.splits):
            raise ValueError(f"splits={self.splits!r}: give numbers of blocks, as (1, 4, 16), or a decay, as 0.9")

    @property
    def drawn(self) -> bool:
        """Whether rows differ."""
        return self.order != "rows" or self.splits != ()

    @property
    def shifted(self) -> int:
        """The size of shifted blocks, 0 where there are none."""
        size = self.splits.removeprefix("shifted:") if isinstance(self.splits, str) else ""
        return int(size) if size.isdigit() else 0

    def check(self, tokens: int) -> None:
        """Raises ValueError for more blocks than tokens, and for shifted blocks of more tokens than there are."""
        if self.shifted > tokens:
            raise ValueError(f"splits={self.splits!r}: an image has {tokens} tokens, and no block can be larger")
        if isinstance(self.splits, tuple) and max(self.splits, default=0) > tokens:
            raise ValueError(f"splits={tuple(self.splits)}: an image of {tokens} tokens has no more blocks than tokens")

    def draw(self, rng: np.random.Generator, tokens: int) -> tuple[Int[np.ndarray, " N"], Int[np.ndarray, " N"] | None]:
        """Number in the grid of each token of a row, and its block; None: those of the segment."""
        numbers = np.arange(tokens, dtype=np.int32)
        order = rng.permutation(numbers) if self.order == "random" else numbers
        if self.splits == ():
            return order, None
        if self.shifted:
            return order, (numbers + rng.integers(self.shifted)).astype(np.int32) // self.shifted
        if isinstance(self.splits, float):
            count = 1 + int(np.searchsorted(_summed_chances(tokens, self.splits), rng.random(), side="right"))
            begins = np.zeros(tokens, np.int32)
            begins[1 + rng.permutation(tokens - 1)[: count - 1]] = 1
            return order, begins.cumsum(dtype=np.int32)
        count = self.splits[rng.integers(len(self.splits))]
        return order, (numbers * count // tokens).astype(np.int32)


def split_chances(tokens: int, decay: float) -> Float[np.ndarray, " N"]:
    """Chances of 1, 2, … N blocks, proportional to decay^(n - 1)."""
    chances = decay ** np.arange(tokens, dtype=np.float64)
    return chances / chances.sum()


@functools.cache
def _summed_chances(tokens: int, decay: float) -> np.ndarray:
    return split_chances(tokens, decay).cumsum()[:-1]  # without the last one, 1 but for rounding


def row_generator(uniform: float | None, index: int) -> np.random.Generator:
    """The generator of a training row with a uniform number of its own, else of row `index` of the ordered pass."""
    return np.random.default_rng((0, index) if uniform is None else (1, int(uniform * 2**53)))
