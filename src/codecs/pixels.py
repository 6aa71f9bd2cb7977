"""The pixels of an image, on the host: cut or fitted to one size, in [-1, 1] when a batch is built."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

STRETCH = 16  # most times that an image may be as long as it is wide: the longer side is scaled before it is cut
FITS = ("crop", "letterbox")


class Pixels:
    """Images of height x width pixels, `channels` 3 (RGB), 1 (grey), or as many as arrays of other values have.

    fit   `crop`: the centre is kept, for images that are made; `letterbox`: the whole image in a black frame, for
          images that are only read

    Raises ValueError for sizes below 1 and an unknown `fit`.
    """

    where: ClassVar[str] = "host"
    spec: ClassVar[None] = None

    def __init__(self, height: int, width: int, channels: int = 3, fit: str = "crop"):
        if min(height, width, channels) < 1 or fit not in FITS:
            raise ValueError(
                f"height={height}, width={width}, channels={channels}, fit={fit!r} is not possible: give sizes of at"
                f" least 1, and one of {', '.join(FITS)}"
            )
        self.shape = (height, width, channels)
        self._fit = crop if fit == "crop" else letterbox

    def encode(self, value: UInt8[np.ndarray, "H W C"]) -> UInt8[np.ndarray, "h w C"]:
        """An image of the codec's size. Raises ValueError for one that cannot be brought to it."""
        return self._fit(value, *self.shape[:2])

    def decode(self, value: Any) -> UInt8[np.ndarray, "*B h w C"]:
        """Pixels of values in [-1, 1]."""
        return np.clip(np.rint((np.asarray(value, np.float32) + 1) * 127.5), 0, 255).astype(np.uint8)


def scaled(pixels: UInt8[np.ndarray, "*B h w C"]) -> Float[np.ndarray, "*B h w C"]:
    """Pixels as float32 in [-1, 1]."""
    return pixels.astype(np.float32) / 127.5 - 1


def crop(pixels: UInt8[np.ndarray, "H W C"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} C"]:
    """The centre of an image: halved by a box filter while it covers twice height x width, then scaled by a bicubic
    filter until it just covers it, then cut (ADM, Dhariwal & Nichol 2021; MonoFormer and DiT alike).

    Raises ValueError for an image that is more than `STRETCH` times as long as it is wide.
    """
    if max(pixels.shape[:2]) > STRETCH * min(pixels.shape[:2]):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are too long for their width")
    image = _image(pixels)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    found = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], -1)
    top, left = (found.shape[0] - height) // 2, (found.shape[1] - width) // 2
    return found[top : top + height, left : left + width]


def letterbox(pixels: UInt8[np.ndarray, "H W C"], height: int, width: int) -> UInt8[np.ndarray, "{height} {width} C"]:
    """A whole image in the middle of a black frame, scaled (bicubic) until one of its sides is the frame's.

    Raises ValueError for an image without pixels.
    """
    if not min(pixels.shape[:2]):
        raise ValueError(f"an image of {pixels.shape[0]} x {pixels.shape[1]} pixels cannot be scaled: leave it out")
    scale = min(height / pixels.shape[0], width / pixels.shape[1])
    rows, columns = (max(round(side * scale), 1) for side in pixels.shape[:2])
    inner = np.asarray(_image(pixels).resize((columns, rows), Image.Resampling.BICUBIC))
    frame = np.zeros((height, width, pixels.shape[2]), np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    frame[top : top + rows, left : left + columns] = inner.reshape(rows, columns, -1)
    return frame


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
