"""From the example of a source to the record of a shard."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
from PIL import Image

from src.codecs.pixels import crop
from src.common.files.images import LIMITS, read_image
from src.common.files.paths import read_bounded
from src.data.example import BadRow, Example, Source, label_of, texts_of, turns_of
from src.data.files.shards import SEVERAL, images_of, pack, values_of
from src.data.splits import example_of
from src.data.templates._spans import document

WITHOUT = ("chats", "documents")  # kinds that need no images
PROBES = 64  # examples that are looked at to learn what kind they are


def kind_of(source: Source) -> str:
    """What the examples of a source are, see `files/shards.py`: what it says, or what its first sound one looks like.

    Raises ValueError where none of its first examples can be read.
    """
    if hasattr(source, "kind"):
        return source.kind
    for number in range(min(len(source), PROBES)):
        try:
            example = example_of(source, number)
        except BadRow:
            continue
        marks = {"parts": "documents", "turns": "chats", "caption": "captions", "label": "classes"}
        return next((kind for name, kind in marks.items() if name in example), "captions")
    raise ValueError(f"none of the first {PROBES} examples of the source can be read")


def classes_of(source: Source, kind: str) -> list[dict[str, str]]:
    """Id and name of each class, of a source of classes."""
    return list(getattr(source, "classes", ())) if kind == "classes" else []


def check_values(kind: str, example: Example, classes: int | None = None) -> None:
    """What can be said of an example without its task. Raises BadRow."""
    if kind == "classes":
        label_of(example, classes)
    elif kind == "chats":
        turns_of(example)
    elif kind == "documents":
        document(example)
    elif not any(isinstance(text, str) and text.strip() for text in example.values()):
        texts_of(example)


def record_of(example: Example, kind: str, classes: int | None = None, *, size: int = 0, check: bool = True) -> bytes:
    """The record of an example. `size` and `check` are those of `prepare.ShardPlan`.

    Raises BadRow, also for an image that cannot be read.
    """
    check_values(kind, example, classes)
    images = images_of(example, kind)
    if not images and kind not in WITHOUT:
        raise BadRow("the image is missing", example.where)
    cut = [True] * len(images)
    if kind in SEVERAL:  # those that are only read stay whole
        cut = [part.kind == "image" for part in document(example)[0] if part.kind != "text"]
    sizes = [size if each else 0 for each in cut]
    files = [file_of(image, example.where, n, check) for image, n in zip(images, sizes, strict=True)]
    return pack(values_of(example, kind), *files, sized=kind in SEVERAL)


def file_of(image: Any, where: str, size: int = 0, check: bool = True) -> bytes:
    """An image's file, cut to its centre of `size` pixels unless that is 0; arrays become PNG. Raises BadRow."""
    try:
        if isinstance(image, np.ndarray):
            image = png(image)
        data = image if isinstance(image, bytes) else read_bounded(image, LIMITS.bytes, "image")
        pixels = read_image(data) if check or size else None
    except FileNotFoundError as error:
        raise BadRow("the image is missing", where, image) from error
    except (ValueError, OSError) as error:
        raise BadRow("the image cannot be read", where, error) from error
    try:
        return png(crop(pixels, size, size)) if size else data
    except ValueError as error:
        raise BadRow("the image is too narrow", where, error) from error


def png(pixels: np.ndarray) -> bytes:
    """A file of pixels [h, w, C]. Raises ValueError for other arrays."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3):
        raise ValueError(f"it is an array of {pixels.dtype} {pixels.shape}, and no image of 1 or 3 channels")
    file = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return file.getvalue()
