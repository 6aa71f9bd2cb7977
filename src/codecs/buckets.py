"""Buckets of aspect ratios whose images have one number of patches, so that all shapes stay static.

Every bucket is a grid of patches, such as 16 x 16, 8 x 32 and 32 x 8, with the same product N. An image of a bucket
travels as an array of the first one's shape: its k-th patch, counted by rows in its own grid, lies where the first
grid has its k-th. Tokens, losses and kernels do not change; the model gets the coordinates for its positions.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Grid = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Buckets:
    """Grids (rows, columns) of patches of `patch` x `patch` pixels; arrays have the shape of the first grid.

    Raises ValueError for grids of different numbers of patches, and for one that is there twice.
    """

    grids: tuple[Grid, ...]
    patch: int

    def __post_init__(self):
        counts = {rows * columns for rows, columns in self.grids}
        if len(counts) != 1 or min(map(min, self.grids), default=0) < 1 or self.patch < 1:
            raise ValueError(f"buckets {self.grids} must be grids (rows, columns) with one product")
        if len(set(self.grids)) < len(self.grids):
            raise ValueError(f"buckets {self.grids} has a grid twice")

    def pixels(self, grid: Grid) -> tuple[int, int]:
        """Height and width of the images of a bucket."""
        return grid[0] * self.patch, grid[1] * self.patch

    def nearest(self, height: int, width: int) -> Grid:
        """The bucket whose ratio of height to width is nearest, the first of equals."""
        apart = lambda grid: abs(math.log(grid[0] / grid[1]) - math.log(height / width))
        return min(self.grids, key=apart)

    def fold(self, images: Any, grid: Grid) -> Any:
        """Images `[…, h, w, C]` of a bucket, of numpy or JAX, as arrays `[…, H, W, C]` of the first one's shape."""
        return _rearrange(images, self.patch, grid, self.grids[0])

    def unfold(self, values: Any, grid: Grid) -> Any:
        """What `fold` was given."""
        return _rearrange(values, self.patch, self.grids[0], grid)

    def each(
        self,
        encode: Callable[[Array], Array],
        values: Float[Array, "B H W C"],
        grids: Int[Array, "B 2"],
        valid: Bool[Array, " B"] | None = None,
    ) -> Float[Array, "B h w D"]:
        """`encode`, images `[1, height, width, C]` -> `[1, height/f, width/f, D]`, of each image in its own grid.

        Values and results are folded. The images are encoded one after the other and each once, those that are not
        `valid` not at all (zeros). Where the rows lie on several devices, call it on those of each.
        """

        def of(grid: Grid) -> Callable[[Array], Array]:
            def one(image: Array) -> Array:
                found = encode(self.unfold(image, grid)[None])[0]
                return dataclasses.replace(self, patch=found.shape[0] // grid[0]).fold(found, grid)

            return one

        branches = [of(grid) for grid in self.grids]
        nothing = jax.eval_shape(branches[0], values[0])
        branches.append(lambda image: jnp.zeros(nothing.shape, nothing.dtype))
        which = jnp.argmax(jnp.all(grids[:, None] == jnp.asarray(self.grids, grids.dtype), axis=-1), axis=1)
        which = which if valid is None else jnp.where(valid, which, len(self.grids))
        # A loop keeps the choice a choice: where rows are computed together, all branches are.
        return jax.lax.map(lambda row: jax.lax.switch(row[0], branches, row[1]), (which, values))


def _rearrange(images: Any, patch: int, source: Grid, target: Grid) -> Any:
    """The same patches, by rows, in another grid."""
    *lead, height, width, channels = images.shape
    if (height, width) != (source[0] * patch, source[1] * patch):
        raise ValueError(f"an image of {height} x {width} has no {source[0]} x {source[1]} patches of {patch} pixels")
    x = images.reshape(-1, source[0], patch, source[1], patch, channels).swapaxes(2, 3)
    x = x.reshape(-1, *target, patch, patch, channels).swapaxes(2, 3)
    return x.reshape(*lead, target[0] * patch, target[1] * patch, channels)


def as_grids(grids: Any) -> tuple[Grid, ...]:
    """Grids of a config, lists or tuples.

    Raises ValueError for what is no list of pairs of whole numbers.
    """
    try:
        found = tuple((rows, columns) for rows, columns in grids)
    except (TypeError, ValueError) as error:
        raise ValueError(f"buckets={grids!r} is not a list of pairs (rows, columns)") from error
    if not all(type(side) is int for grid in found for side in grid):
        raise ValueError(f"buckets={grids!r} is not a list of pairs of whole numbers")
    return found
