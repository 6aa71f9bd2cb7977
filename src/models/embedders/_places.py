"""Fixed sin-cos positions of the tokens of a grid."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from src.models.layers import sincos_axis


def grid_positions(
    grid: tuple[int, ...], width: int, place: Int[Array, "*B N axes"] | None = None
) -> Float[Array, "*B N D"]:
    """Positions in a grid of any number of axes, f32; the axes share the width evenly, the last axis first.

    place   coordinates of each token, where they differ from the grid's own; each below the grid's number of tokens,
            so that other grids of as many tokens (buckets of aspect ratios) fit. None: row-major, [N, D]

    Raises ValueError when twice the number of axes does not divide the width.
    """
    if not grid:
        raise ValueError("embed: sin-cos positions need tokens of a grid, and this field's have none")
    if width % (2 * len(grid)):
        raise ValueError(
            f"model.trunk.width={width} must be a multiple of {2 * len(grid)} for sin-cos positions in a grid of {grid}"
        )
    size = width // len(grid)
    if place is None:
        coordinates = np.unravel_index(np.arange(np.prod(grid)), grid)
        return jnp.asarray(np.concatenate([sincos_axis(c, size) for c in reversed(coordinates)], axis=-1))
    table = jnp.asarray(sincos_axis(np.arange(np.prod(grid)), size))
    return jnp.concatenate([table[place[..., axis]] for axis in reversed(range(len(grid)))], axis=-1)
