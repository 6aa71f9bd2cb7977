"""The images of a template: files, arrays or moments of latents, as the row keeps them and as the batch has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from src.codecs.pixels import scaled
from src.common.files.images import read_image
from src.data.example import BadRow
from src.data.pipeline.reader import Row
from src.interfaces import Field, Tokens
from src.sequence.segment import Segment

HOLDS = ("pixels", "values", "moments")


def delivered(field: Field, holds: str) -> tuple[int, int, int]:
    """Shape (h, w, C) of what the data deliver of an image: before the frozen network, or, of moments, instead of what
    it computes.

    Raises ValueError where a source has moments and the field no autoencoder.
    """
    chain = field.codec
    if holds == "moments":
        if chain.frozen is None:
            raise ValueError(f"the source has moments of latents, but fields.{field.name}.codec has no autoencoder")
        height, width, channels = chain.frozen.shape
        return height, width, 2 * channels
    first = chain.host
    if first.where == "frozen":  # a network that takes pictures as its own `preprocess` makes them
        return first.preprocess(np.zeros((2, 2, 3), np.uint8)).shape
    return first.shape


class Images:
    """The images of one name.

    made     they are targets; else they are only read
    always   their tokens are there in every row; else those of a row without an image are padding
    holds    what the source has: see `example.py`
    """

    def __init__(self, name: str, field: Field, holds: str, *, made: bool, always: bool = True, **options: Any):
        if holds not in HOLDS:
            raise ValueError(f"the source holds {holds!r}; it may hold {', '.join(HOLDS)}")
        self.name, self.made, self.always, self.holds = name, made, always, holds
        self.shape, self.tokens_of_one = delivered(field, holds), field.spec.tokens
        first = field.codec.host
        self.preprocess = getattr(first, "preprocess", None) if first.where == "frozen" else None
        self.fit = first.encode if self.preprocess is None else None
        floats = {"pixels": np.uint8 if self.preprocess is None else np.float32, "values": np.float32}
        self.dtype = np.dtype(floats.get(holds, np.float16))
        self.segment = Segment((name,), self.tokens_of_one, **options)

    def row(self, image: Any, where: str, *, prompt: bool = False) -> Row:
        """The arrays of an image. Raises BadRow."""
        return {
            self.name: self._load(image, where),
            f"{self.name}/there": np.asarray(True),
            f"{self.name}/target": np.asarray(self.made and not prompt),
        }

    def absent(self, make: bool = False) -> Row:
        """The arrays of a row without an image, or of one whose image is to be made."""
        return self.blank() | {f"{self.name}/there": np.asarray(False), f"{self.name}/target": np.asarray(make)}

    def blank(self) -> Row:
        """The arrays of a row that was refused."""
        flags = {f"{self.name}/{kind}": np.asarray(False) for kind in ("there", "target")}
        return {self.name: np.zeros(self.shape, self.dtype)} | flags

    def tokens(self, rows: Mapping[str, np.ndarray]) -> Tokens:
        """The tokens of stacked rows: pixels in [-1, 1], other values as they are; float32."""
        there, target = rows[f"{self.name}/there"], rows[f"{self.name}/target"]
        value = rows[self.name]
        value = scaled(value) if value.dtype == np.uint8 else value.astype(np.float32)
        value = np.where(there[..., None, None, None], value, np.float32(0))
        spread = lambda flags: np.repeat(flags[..., None], self.tokens_of_one, axis=-1)
        return Tokens(value, spread(there | target | self.always), spread(target))

    def invent(self, rng: np.random.Generator, number: int, target: bool) -> Row:
        """A random image."""
        if self.dtype == np.uint8:
            value = rng.integers(0, 256, self.shape).astype(np.uint8)
        else:
            value = rng.standard_normal(self.shape).astype(self.dtype)
        flags = {f"{self.name}/there": np.asarray(True), f"{self.name}/target": np.asarray(target)}
        return {self.name: value} | flags

    def _load(self, image: Any, where: str) -> np.ndarray:
        if self.holds == "pixels":
            return self._pixels(image, where)
        if self.holds == "moments" and isinstance(image, bytes):
            image = _moments(image, self.shape, where)
        value = np.asarray(image)
        if value.shape != self.shape or not np.issubdtype(value.dtype, np.floating):
            raise BadRow("the image has another shape", where, f"{value.dtype} {value.shape} instead of {self.shape}")
        return value.astype(self.dtype)

    def _pixels(self, image: Any, where: str) -> np.ndarray:
        fit = self.fit or (lambda pixels: np.asarray(self.preprocess(pixels), np.float32))
        return fitted(image, where, self.shape[2], fit)


def fitted(image: Any, where: str, channels: int, fit: Any) -> Any:
    """What `fit` makes of the pixels [h, w, channels] of an image, where it may raise ValueError. Raises BadRow."""
    try:
        if image is None:
            raise FileNotFoundError
        pixels = image if isinstance(image, np.ndarray) else read_image(image, channels=channels)
    except FileNotFoundError as error:
        raise BadRow("the image is missing", where, image if isinstance(image, epath.Path) else "") from error
    except (ValueError, OSError) as error:
        raise BadRow("the image cannot be read", where, error) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != channels:
        raise BadRow("the image has another shape", where, f"{pixels.dtype} {pixels.shape}, wanted {channels} channels")
    try:
        return fit(pixels)
    except ValueError as error:
        raise BadRow("the image is too narrow", where, error) from error


def _moments(data: bytes, shape: tuple[int, int, int], where: str) -> np.ndarray:
    """A row's moments. Raises BadRow for what has another number of bytes, or values that are not finite."""
    if len(data) != math.prod(shape) * 2:
        raise BadRow("there are no such moments", where, f"{len(data):,} bytes instead of {math.prod(shape) * 2:,}")
    values = np.frombuffer(data, "<f2").reshape(shape)
    if not np.isfinite(values).all():
        raise BadRow("the moments are not finite", where)
    return values


def shift_images(images: np.ndarray, offsets: np.ndarray, background: float) -> np.ndarray:
    """Images [B, h, w, C] moved by whole pixels, `offsets` [B, 2] down and right; what enters is `background`."""
    count, height, width, _ = images.shape
    margin = int(np.abs(offsets).max(initial=0))
    pad = ((0, 0), (margin, margin), (margin, margin), (0, 0))
    padded = np.pad(images, pad, constant_values=background)
    rows = np.arange(height)[None] + margin - offsets[:, :1]
    columns = np.arange(width)[None] + margin - offsets[:, 1:]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def shifts(uniforms: np.ndarray, most: int) -> np.ndarray:
    """Offsets in -most .. most from uniform numbers in [0, 1), same shape."""
    return choose(uniforms, 2 * most + 1) - most


def choose(uniform: np.ndarray, count: int) -> np.ndarray:
    """Uniform choices in 0 .. count-1 from uniform numbers in [0, 1)."""
    return (uniform * count).astype(np.int64)
