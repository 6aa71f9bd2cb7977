"""From tokens that were made back to values: places, device links, frozen networks, the ends of texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from src.interfaces import Field, Tokens


def decoded(field: Field, value: np.ndarray, tokens: Tokens, frozen: Callable[[str, np.ndarray], np.ndarray]) -> Any:
    """Values in front of the first link of a field's codec, an array [n, …] or a list where shapes differ.

    value    tokens [n, N, …]
    tokens   what the rows had of them: a text is what follows its given beginning, up to its end
    frozen   (field, values) -> as the frozen link before them was given them
    """
    end = getattr(field.codec.host, "eos", None) if field.codec is not None else None
    if end is not None:
        target = tokens.target & tokens.valid
        return [_until(row[flags].tolist(), end) for row, flags in zip(value, target, strict=True)]
    if field.codec is None:
        return value
    if tokens.place is None:
        return np.asarray(frozen(field.name, np.asarray(field.codec.decode(jnp.asarray(value)))))
    grids = tokens.place.max(axis=1) + 1
    found: dict[int, np.ndarray] = {}
    for grid in {tuple(grid) for grid in grids.tolist()}:
        rows = np.flatnonzero((grids == grid).all(axis=1))
        images = _in_grid(field, ordered(value[rows], tokens.place[rows], grid), grid)
        found |= dict(zip(rows.tolist(), np.asarray(frozen(field.name, images)), strict=True))
    images = [found[row] for row in range(len(value))]
    return np.stack(images) if len({image.shape for image in images}) == 1 else images


def ordered(value: np.ndarray, place: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """Tokens [n, N, …] in the row-major order of their grid; `place` [n, N, axes] is where each of them lies."""
    number = np.ravel_multi_index(tuple(np.moveaxis(place, -1, 0)), grid)
    out = np.empty_like(value)
    np.put_along_axis(out, number.reshape(*number.shape, *[1] * (value.ndim - 2)), value, axis=1)
    return out


def _in_grid(field: Field, value: np.ndarray, grid: tuple[int, ...]) -> np.ndarray:
    """What the device links make of tokens in a grid, the field's own or another one of as many tokens."""
    tokens = jnp.asarray(value)
    for link in reversed(field.codec.device):
        link = link.shaped(grid) if grid != field.spec.grid and hasattr(link, "shaped") else link
        tokens = link.decode(tokens)
    return np.asarray(tokens)


def _until(ids: list[int], end: int) -> list[int]:
    return ids[: ids.index(end)] if end in ids else ids
