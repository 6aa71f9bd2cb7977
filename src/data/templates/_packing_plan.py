"""Which documents share a row: decided once, from how long they are, which is remembered between the runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from absl import logging

from src.data.example import BadRow
from src.data.files.index_cache import cached_table
from src.data.templates._spans import Room, Spans
from src.sequence.packing import Packs, pack

LAYOUT = 3  # to be raised when documents are laid out otherwise


class Plan(NamedTuple):
    """Which documents share a row: those of `packs`, by their place in `good`; then each bad one has a row."""

    good: np.ndarray
    packs: Packs
    bad: np.ndarray
    cut: int

    def __len__(self) -> int:
        return len(self.packs) + len(self.bad)

    def __getitem__(self, row: int) -> np.ndarray:
        """The documents of a row."""
        if row < len(self.packs):
            return self.good[self.packs[row]]
        return self.bad[row - len(self.packs) : row - len(self.packs) + 1]


def plan_rows(split: str, numbers: np.ndarray, sizes: np.ndarray, room: Room) -> Plan:
    """The rows of the documents `numbers` [N], whose sizes are `sizes` [N, 4], see `measure`. The log tells them."""
    sound = sizes[:, 0] > 0
    order = np.random.default_rng(0).permutation(np.flatnonzero(sound))  # neighbours may be alike
    packs = pack(sizes[order, :-1], room)
    cut, bad = int((sizes[sound, -1] == 0).sum()), numbers[~sound]
    logging.log(
        logging.WARNING if cut or len(bad) else logging.INFO,
        "split %s: %d documents in %d rows of %d slots, %.1f%% of them padding; %d are cut, %d cannot be used",
        split, len(numbers), len(packs), room.slots, 100 * packs.padding, cut, len(bad),
    )  # fmt: skip
    return Plan(numbers[order], packs, bad, cut)


def measure(count: int, read: Callable[[int], Spans], about: Any) -> np.ndarray:
    """Tokens, images that are made, those that are read, and whether it is whole (1), int32 `[count, 4]`, of each
    document; 0 of what `read` refuses.

    about    all that the sizes depend on, as JSON: the cache keeps them under it; None: nobody knows, nothing is kept
    """

    def find() -> np.ndarray:
        sizes = np.zeros((count, 4), np.int32)
        for number in range(count):
            try:
                found = read(number)
            except BadRow:
                continue
            sizes[number] = *found.size, found.whole
        return sizes

    if about is None:
        return find()
    return cached_table("documents", [str(LAYOUT), json.dumps(about, sort_keys=True)], find)
