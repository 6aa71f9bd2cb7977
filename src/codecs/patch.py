"""Patches: images <-> a row-major grid of feature vectors, on the device."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from jaxtyping import Array, Float

from src.interfaces import FieldSpec


@dataclasses.dataclass(frozen=True)
class Patch:
    """Square patches of `size` pixels; P = channels · size², features ordered (channel, row, column), channel slowest.

    Token n covers grid cell (n // columns, n % columns). `encode` also maps values v to (v - shift) · scale, `decode`
    back, e.g. scale 0.18215 for Stable Diffusion's latents. Order: MonoFormer, DiT's patch embedding.

    before   the link in front, whose `shape` (h, w, C) is that of the images

    Raises ValueError when the patch does not divide the image.
    """

    where: ClassVar[str] = "device"

    size: int
    before: Any
    scale: float = 1.0
    shift: float = 0.0

    def __post_init__(self):
        if self.size < 1 or self.height % self.size or self.width % self.size:
            raise ValueError(
                f"patch size {self.size} does not divide an image of {self.height} x {self.width}: "
                "choose a common divisor"
            )
        if self.scale == 0:
            raise ValueError("patch scale 0 would erase the image: give a scale other than 0")

    @property
    def height(self) -> int:
        """Of the images."""
        return self.before.shape[0]

    @property
    def width(self) -> int:
        """Of the images."""
        return self.before.shape[1]

    @property
    def channels(self) -> int:
        """Of the images."""
        return self.before.shape[2]

    @property
    def spec(self) -> FieldSpec:
        """Of the tokens."""
        return FieldSpec(self.grid, features=self.features)

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens and features of one image."""
        return self.tokens, self.features

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        return self.height // self.size, self.width // self.size

    @property
    def tokens(self) -> int:
        """N, the number of tokens of one image."""
        return self.grid[0] * self.grid[1]

    @property
    def features(self) -> int:
        """P, the length of one token."""
        return self.channels * self.size**2

    def shaped(self, grid: tuple[int, int]) -> Patch:
        """The codec of images in another grid of as many tokens, rows and columns (`codecs/buckets.py`).

        Raises ValueError for a grid of another number of tokens.
        """
        if min(grid) < 1 or grid[0] * grid[1] != self.tokens:
            raise ValueError(f"a grid of {grid[0]} x {grid[1]} has not {self.tokens} patches: give one that has")
        shape = (grid[0] * self.size, grid[1] * self.size, self.channels)
        return dataclasses.replace(self, before=_Shaped(shape))

    def encode(self, values: Float[Array, "B height width C"]) -> Float[Array, "B N P"]:
        """Tokens of images.

        Raises ValueError if the images are not [B, height, width, channels].
        """
        if values.shape[1:] != (self.height, self.width, self.channels):
            raise ValueError(
                f"images are {tuple(values.shape[1:])}, the patch codec expects "
                f"{(self.height, self.width, self.channels)} (height, width, channels)"
            )
        rows, columns = self.grid
        x = values.reshape(-1, rows, self.size, columns, self.size, self.channels)
        x = x.transpose(0, 1, 3, 5, 2, 4).reshape(-1, self.tokens, self.features)
        return (x - self.shift) * self.scale

    def decode(self, tokens: Float[Array, "B N P"]) -> Float[Array, "B height width C"]:
        """Images of tokens, the inverse of `encode`.

        Raises ValueError if the tokens are not [B, N, P].
        """
        if tokens.shape[1:] != (self.tokens, self.features):
            raise ValueError(
                f"tokens are {tuple(tokens.shape[1:])}, the patch codec expects {(self.tokens, self.features)}"
            )
        rows, columns = self.grid
        x = tokens.reshape(-1, rows, columns, self.channels, self.size, self.size)
        x = x.transpose(0, 1, 4, 2, 5, 3).reshape(-1, self.height, self.width, self.channels)
        return x / self.scale + self.shift


@dataclasses.dataclass(frozen=True)
class _Shaped:
    shape: tuple[int, int, int]
