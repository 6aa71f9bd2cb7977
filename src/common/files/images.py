"""Untrusted image files: a few formats, bounded in bytes and pixels before anything is decoded."""

from __future__ import annotations

import dataclasses
import io
import os

import numpy as np
from jaxtyping import UInt8

from src.common.files.image_metadata import JPEG, PNG, strip_jpeg, strip_png
from src.common.files.paths import read_bounded, shown

ENDINGS = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".png", ".apng", ".webp", ".gif", ".bmp")  # of what is read
SCANS = 100  # of a progressive JPEG; a scan of ten bytes costs a pass over all pixels, and encoders write about ten


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of an image: bytes of the file, pixels (width x height), and Pillow's names of formats."""

    bytes: int = 64 << 20
    pixels: int = 1 << 26
    formats: tuple[str, ...] = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


LIMITS = Limits()


class ImageError(ValueError):
    """An image file that is not decoded, and why."""


def read_image(
    file: str | os.PathLike[str] | bytes, limits: Limits = LIMITS, *, channels: int = 3
) -> UInt8[np.ndarray, "H W C"]:
    """The pixels of an image, `[H, W, 3]` RGB or, with `channels=1`, `[H, W, 1]` grey; `file` is a path or its bytes.

    The first frame of an animation, turned by its EXIF orientation; transparent pixels lie on white, 16 bits
    become 8, palettes and CMYK become RGB. Other metadata, of any length, and what follows the end of a PNG or JPEG are
    ignored, colour profiles too.

    Raises FileNotFoundError, OSError when the file cannot be read, and ImageError, in one sentence, for what is no
    image of `limits.formats`, has more bytes or pixels than `limits` allow, or is truncated or damaged (where its
    format has checksums: a JPEG or GIF with a wrong bit may decode to wrong pixels).
    """
    where = "the image" if isinstance(file, bytes) else f"the image {shown(os.fspath(file))}"
    if isinstance(file, bytes):
        data = file
    else:
        try:
            data = read_bounded(file, limits.bytes, "image")
        except ValueError as error:
            raise ImageError(str(error)) from error
    try:
        return _decode(data, limits, channels)
    except ImageError as error:
        raise ImageError(f"{where} is not an image that can be read ({error}): give another PNG or JPEG") from error
    except Exception as error:  # Pillow raises OSError, SyntaxError, struct.error, zlib.error, MemoryError and more
        reason = f"{type(error).__name__}: {shown(error)}" if str(error) else type(error).__name__
        raise ImageError(f"{where} is not an image that can be read ({reason}): give another PNG or JPEG") from error


def _decode(data: bytes, limits: Limits, channels: int) -> np.ndarray:
    from PIL import Image, UnidentifiedImageError

    if len(data) > limits.bytes:
        raise ImageError(f"it has more than {limits.bytes:,} bytes")
    if not data:
        raise ImageError("the file is empty")
    _check_webp(data, limits)
    data = _without_metadata(data)
    try:
        opened = Image.open(io.BytesIO(data), formats=limits.formats)
    except UnidentifiedImageError as error:  # its own words are the address of the bytes
        raise ImageError(f"it does not begin as a sound {', '.join(limits.formats)}") from error
    with opened as image:
        _check_pixels(*image.size, limits)
        image.load()
        turn = _orientation(image)
        pixels = _eight_bits(image, channels)
    if turn is not None:
        pixels = pixels.transpose(turn)
    return np.asarray(pixels, np.uint8).reshape(pixels.height, pixels.width, channels)


def _without_metadata(data: bytes) -> bytes:
    """The file with nothing but what its pixels depend on; here the checksums of a PNG file are verified."""
    try:
        if data.startswith(PNG):
            return strip_png(data)
        return strip_jpeg(data, SCANS) if data.startswith(JPEG) else data
    except ValueError as error:
        raise ImageError(str(error)) from error


def _check_pixels(width: int, height: int, limits: Limits) -> None:
    if not 0 < width * height <= limits.pixels:
        raise ImageError(f"it has {width} x {height} pixels and {limits.pixels:,} are allowed")


def _check_webp(data: bytes, limits: Limits) -> None:
    """The size that a WebP file declares: Pillow allocates its canvas when it opens the file."""
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP":
        return
    kind = data[12:16]
    if len(data) < 30 or kind not in (b"VP8X", b"VP8 ", b"VP8L"):
        raise ImageError("it is a WebP file without a size")
    if kind == b"VP8X":
        width, height = (1 + int.from_bytes(data[at : at + 3], "little") for at in (24, 27))
    elif kind == b"VP8 ":
        width, height = (int.from_bytes(data[at : at + 2], "little") & 0x3FFF for at in (26, 28))
    else:
        bits = int.from_bytes(data[21:25], "little")
        width, height = 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    _check_pixels(width, height, limits)


def _orientation(image):
    """Pillow's transposition for the EXIF orientation, or None."""
    from PIL.Image import Transpose as T

    turns = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)
    try:
        value = image.getexif().get(0x0112)
    except Exception:  # broken notes do not spoil the pixels
        return None
    return turns[value - 2] if isinstance(value, int) and 2 <= value <= 8 else None


def _eight_bits(image, channels: int):
    """The image as Pillow's "L" or "RGB"."""
    from PIL import Image

    target = "L" if channels == 1 else "RGB"
    if image.mode.startswith(("I;16", "I")):  # grey of 16 bits, by Pillow's version
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray((values // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(target)
