"""A whole image in a square with black borders, on the host (MonoFormer's preparation of images that are read)."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from src.interfaces import FieldSpec


@dataclasses.dataclass(frozen=True)
class Letterbox:
    """The first link of a chain: pixels of any size -> [size, size, channels] in [-1, 1]."""

    size: int
    channels: int = 3
    where: ClassVar[str] = "host"
    spec: ClassVar[FieldSpec | None] = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of one image behind this link."""
        return self.size, self.size, self.channels

    def preprocess(self, pixels: UInt8[np.ndarray, "h w C"]) -> Float[np.ndarray, "S S C"]:
        """The image in its square."""
        return letterbox(pixels, self.size)


def letterbox(pixels: UInt8[np.ndarray, "h w C"], size: int) -> Float[np.ndarray, "{size} {size} C"]:
    """An image scaled (bicubic) until its longer side is `size`, in the middle of a black square, in [-1, 1].

    Raises ValueError for an image without pixels.
    """
    height, width, channels = pixels.shape
    if not height or not width:
        raise ValueError(f"an image of {height} x {width} pixels cannot be scaled: leave it out")
    scale = size / max(height, width)
    new = max(round(width * scale), 1), max(round(height * scale), 1)
    image = Image.fromarray(pixels[..., 0] if channels == 1 else pixels).resize(new, Image.Resampling.BICUBIC)
    square = np.zeros((size, size, channels), np.uint8)
    top, left = (size - new[1]) // 2, (size - new[0]) // 2
    square[top : top + new[1], left : left + new[0]] = np.asarray(image).reshape(new[1], new[0], channels)
    return square.astype(np.float32) / 127.5 - 1
