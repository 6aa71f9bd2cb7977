"""Generated tokens to raw values: order of tokens, device links, frozen networks, ends of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from src.codecs.chain import decode_compiled
from src.interfaces import Field, Tokens


def decoded(field: Field, value: np.ndarray, tokens: Tokens, frozen: Callable[[str, np.ndarray], np.ndarray]) -> Any:
    """Inputs of the first link of a field's codec, an array [n, …], or a list if shapes differ.

    value    generated tokens [n, N, …]
    tokens   `target`, `valid` and `place` of the rows; a text is its targets up to the end-of-text id, and the host
             link's `cut(value, count)` leaves out what stands behind so many valid tokens, where it has one
    frozen   (field, values) -> the frozen link's `decode` of the values
    """
    end = getattr(field.codec.host, "eos", None) if field.codec is not None else None
    if end is not None:
        target = tokens.target & tokens.valid
        return [_until(row[flags].tolist(), end) for row, flags in zip(value, target, strict=True)]
    if field.codec is None:
        return value
    if tokens.place is None:
        found = np.asarray(frozen(field.name, np.asarray(decode_compiled(field.codec, value))))
        cut = getattr(field.codec.host, "cut", None)
        counts = tokens.valid.sum(axis=1).tolist()
        return found if cut is None else [cut(each, count) for each, count in zip(found, counts, strict=True)]
    grids = tokens.place.max(axis=1) + 1
    found: dict[int, np.ndarray] = {}
    for grid in {tuple(grid) for grid in grids.tolist()}:
        rows = np.flatnonzero((grids == grid).all(axis=1))
        images = np.asarray(decode_compiled(field.codec, row_major(value[rows], tokens.place[rows], grid), grid))
        found |= dict(zip(rows.tolist(), np.asarray(frozen(field.name, images)), strict=True))
    images = [found[row] for row in range(len(value))]
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def row_major(value: np.ndarray, place: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Tokens [n, N, …] in the row-major order of their grid; `place` [n, N, axes] has their grid positions."""
    number = np.ravel_multi_index(tuple(np.moveaxis(place, -1, 0)), grid)
    out = np.empty_like(value)
    np.put_along_axis(out, number.reshape(*number.shape, *[1] * (value.ndim - 2)), value, axis=1)
    return out


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
