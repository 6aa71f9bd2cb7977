"""Pictures for people: images in a grid with their captions above, and PNG files."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageDraw, ImageFont

from src.common.files.store import write_named

FONT_SIZE, LINE, GAP = 14, 17, 8
WIDTH = 112  # a cell is at least so wide, to hold words of a caption
MOST_LINES = 4


def caption_grid(
    images: Float[np.ndarray, "n h w C"],
    captions: Sequence[str],
    columns: int,
    *,
    scale: int | None = None,
    colors: Sequence[str] | None = None,
) -> UInt8[np.ndarray, "H W 3"]:
    """Images in [-1, 1], enlarged `scale` times, in rows of `columns`; each below its caption in its color.

    By default the scale makes an image about 112 pixels wide. Long captions are wrapped, and cut after four lines.
    Raises ValueError for no images, other numbers of captions or colors, or channels that are no picture.
    """
    colors = ["black"] * len(images) if colors is None else colors
    if not len(images) == len(captions) == len(colors) or not len(images):
        raise ValueError(
            f"a picture of {len(images)} images needs as many captions and colors, and at least one; "
            f"got {len(captions)} captions and {len(colors)} colors"
        )
    pixels = _pixels(images)
    scale = max(1, round(WIDTH / pixels.shape[2])) if scale is None else scale
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    height, width = pixels.shape[1:3]
    font = ImageFont.load_default(size=FONT_SIZE)
    cell = max(width, WIDTH)
    texts = [_wrap(caption, font, cell) for caption in captions]
    above = LINE * max(map(len, texts)) + 2
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (cell + GAP) + GAP, rows * (above + height + GAP) + GAP), "white")
    draw = ImageDraw.Draw(page)
    for i, (image, lines, color) in enumerate(zip(pixels, texts, colors, strict=True)):
        left = GAP + i % columns * (cell + GAP)
        top = GAP + i // columns * (above + height + GAP)
        for number, line in enumerate(lines):
            # Short captions stand directly on their image.
            draw.text((left, top + above - LINE * (len(lines) - number) - 2), line, fill=color, font=font)
        page.paste(Image.fromarray(image), (left, top + above))
    return np.asarray(page)


def save_png(path: str | os.PathLike[str], picture: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes the picture whole, so that nobody reads half a file; makes the folder if needed.

    Raises OSError, in one sentence, if it cannot be written.
    """
    data = io.BytesIO()
    Image.fromarray(picture).save(data, "png")
    write_named(path, data.getvalue(), "picture")


def _pixels(images: np.ndarray) -> np.ndarray:
    if images.ndim != 4 or images.shape[3] not in (1, 3):
        raise ValueError(f"a picture needs images [n, h, w, 1 or 3], not {list(images.shape)}")
    values = np.clip(np.nan_to_num(images.astype(np.float32), nan=0.0), -1, 1)
    pixels = np.round((values + 1) * 127.5).astype(np.uint8)
    return pixels if images.shape[3] == 3 else pixels.repeat(3, axis=3)


def _wrap(text: str, font: Any, width: int) -> list[str]:
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_cut(word, font, width))
    if len(lines) > MOST_LINES:
        lines = [*lines[: MOST_LINES - 1], _cut(f"{lines[MOST_LINES - 1]}…", font, width)]
    return lines or [""]


def _cut(word: str, font: Any, width: int) -> str:
    if font.getlength(word) <= width:
        return word
    while word and font.getlength(f"{word}…") > width:
        word = word[:-1]
    return f"{word}…"
