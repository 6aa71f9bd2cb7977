"""Sets of images that are scored: a folder that `src.tools.draw` wrote, a folder of image files, a file of samples."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import UInt8

from src.common.files.images import ENDINGS, read_image
from src.common.files.npz import Npz
from src.common.files.paths import shown
from src.common.tree import listed
from src.evals.scores.drawn_images import ABOUT, read_about, read_drawn
from src.evals.scores.networks import FeatureNetwork, rows_at_once
from src.evals.scores.statistics import SAMPLES, Statistics, check_network, read_samples, read_statistics

LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """Images of one size.

    about    where they are from, and what they were made with
    blocks   reads them in order, in blocks
    warning  what may change a score, or ""
    """

    about: dict[str, Any]
    blocks: Callable[[], Iterator[UInt8[np.ndarray, "n h w 3"]]]
    warning: str = ""


def open_images(path: str, block: int = 0) -> ImageSet:
    """The images at `path`, in blocks of so many (0: as many as are computed at a time).

    Raises FileNotFoundError, and ValueError, in one sentence, for what holds no images, or images of several sizes.
    """
    place, about, block = epath.Path(path), {"path": path}, block or rows_at_once()
    if place.is_dir() and (place / ABOUT).exists():
        return ImageSet(about | {"drawn": read_about(place)}, lambda: read_drawn(place, block))
    if place.is_dir():
        files = sorted(p for p in pathlib.Path(path).rglob("*") if p.suffix.lower() in ENDINGS)
        if not files:
            raise ValueError(f"{shown(path)} has no images: give a folder of PNG files, or of src.tools.draw")
        lossy = sum(p.suffix.lower() in LOSSY for p in files)
        told = f"{lossy} of {len(files)} images are JPEG files, whose artefacts change every score: keep PNG"
        return ImageSet(about | {"files": len(files)}, lambda: _read_files(files, block), told if lossy else "")
    if SAMPLES not in Npz(path).names():
        raise ValueError(f"{shown(path)} has moments and no images: only distances of moments can be had from it")
    return ImageSet(about, lambda: read_samples(path, block))


def open_reference(path: str | None, network: FeatureNetwork) -> tuple[ImageSet | None, dict[str, Statistics]]:
    """The real images at `path`, or None, and the moments by output that its file has. Raises as `open_images` and
    `read_statistics`."""
    if not path:
        return None, {}
    have = Npz(path).names() if os.path.isfile(path) else (SAMPLES,)
    found = {}
    if len(have) > 1:
        check_network(path, network.identity)
    if "mu" in have and "pool" in network.outputs:
        found["pool"] = read_statistics(path, network.outputs["pool"])
    if "mu_s" in have and "spatial" in network.outputs:
        found["spatial"] = read_statistics(path, network.outputs["spatial"], spatial=True)
    return open_images(path) if SAMPLES in have or not found else None, found


def _read_files(files: list[pathlib.Path], block: int) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    first = None
    for start in range(0, len(files), block):
        images = [read_image(path) for path in files[start : start + block]]
        first = images[0].shape if first is None else first
        wrong = [os.fspath(files[start + i]) for i, image in enumerate(images) if image.shape != first]
        if wrong:
            size = f"{first[0]} x {first[1]}"
            raise ValueError(
                f"images of one size are scored, and {listed(wrong, 1)} is not {size} as {os.fspath(files[0])}: cut all"
                " of them alike first"
            )
        yield np.stack(images)
