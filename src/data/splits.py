"""Which rows of a source are its split "train", and which are "test"."""

from __future__ import annotations

from typing import Any

import numpy as np

from src.data.example import BadRow, Example, Source, as_example

SPLITS = ("train", "test")
FAULTS = (LookupError, TypeError, AttributeError, ArithmeticError)  # of a source's own code


def check_split(split: str) -> None:
    """Raises ValueError for a split that is not one of `SPLITS`."""
    if split not in SPLITS:
        raise ValueError(f"there is no split {split!r}: use one of {', '.join(SPLITS)}")


def rows_of(source: Source, split: str) -> int:
    """Rows of a split, bad ones included.

    Raises what opening the source raises, and ValueError if the split is empty or unknown.
    """
    check_split(split)
    total, held = len(source), held_out(source)
    rows = held if split == "test" else total - held
    if not 0 < rows <= total:
        raise ValueError(
            f"split {split!r} is empty: the source has {total} rows and held_out={getattr(source, 'held_out', 0)} of"
            " them are for test: give more, or set another held_out"
        )
    return rows


def held_out(source: Source) -> int:
    """Rows of the split "test": `held_out`, and those before them that go on with the same chat."""
    held, total = getattr(source, "held_out", 0), len(source)
    if not isinstance(held, int | np.integer):
        raise ValueError(f"held_out={held!r} is not possible: give a whole number of rows")
    if held < 0:
        raise ValueError(f"held_out={held} is not possible: give no negative number of rows")
    goes_on = getattr(source, "goes_on", None)
    inside = False
    while goes_on and 0 < held < total and (inside := _goes_on(source, total - held, inside)):
        held += 1
    return held


def _goes_on(source: Source, number: int, inside: bool) -> bool:
    """Whether a row goes on with the chat before it; a damaged one is taken to be like the row behind it."""
    try:
        return source.goes_on(number)
    except BadRow:
        return inside


def numbers_of(source: Source, split: str, index: Any) -> Any:
    """Numbers in the source of one row of a split, or of an array of them."""
    held = getattr(source, "held_out", 0)
    if not held:
        return index
    if not getattr(source, "spread", False):
        return index + (rows_of(source, "train") if split == "test" else 0)
    test = (2 * np.arange(held) + 1) * len(source) // (2 * held)
    if split == "test":
        return test[index]
    return index + np.searchsorted(test - np.arange(held), index, side="right")


def example_of(source: Source, number: int, uniforms: np.ndarray | None = None) -> Example:
    """An example, with random changes where the source has `draws` and there are numbers for them.

    Raises BadRow, and RuntimeError with the source, the row and the reason where the source itself fails.
    """
    try:
        if uniforms is not None and getattr(source, "draws", 0):
            return as_example(source.drawn(number, uniforms), f"row {number}")
        return as_example(source[number], f"row {number}")
    except FAULTS as error:
        what = " ".join(f"{type(error).__name__}: {error}".split())
        told = f"the source {type(source).__module__}:{type(source).__qualname__} fails at row {number} ({what})"
        raise RuntimeError(f"{told}: correct it, or raise BadRow for a row without use") from error
