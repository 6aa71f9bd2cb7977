"""What a codec loses: images of a source, and what comes back of them through a field's codec."""

from __future__ import annotations

import contextlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import UInt8

from src.codecs.pixels import scaled
from src.common.files.images import ENDINGS
from src.common.files.paths import shown
from src.data.example import BadRow, Example
from src.data.images import fitted
from src.data.splits import example_of, numbers_of, rows_of
from src.evals.frechet import frechet_of_moments
from src.evals.scores import similarity
from src.evals.scores.moments import FeatureMoments
from src.evals.scores.networks import FeatureNetwork
from src.interfaces import Field
from src.sampling.frozen_links import FrozenLinks


def check_codec(field: Field) -> None:
    """Raises ValueError, in one sentence, for a field whose codec makes no images of tokens."""
    chain, where = field.codec, f"fields.{field.name}.codec"
    if len(chain.delivered) != 3 or chain.delivered[2] not in (1, 3) or not hasattr(chain.host, "decode"):
        raise ValueError(f"{where} gives back no images of 1 or 3 channels: name a field that makes images")
    if chain.frozen is not None and not hasattr(chain.frozen, "decode"):
        raise ValueError(f"{where} has a network that only reads images: name a field that makes them")


def check_source(source: Any, where: str) -> None:
    """Raises ValueError for a source that has latents in place of images."""
    if getattr(source, "holds", "pixels") == "moments":
        raise ValueError(
            f"{where} has moments of latents and no images: give the images themselves, as --images or as a reference"
        )


class ImageFiles:
    """A source of all image files below a folder, in the order of their paths: `image`, a path.

    Raises ValueError for a folder without any.
    """

    def __init__(self, folder: str):
        self.files = sorted(path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in ENDINGS)
        if not self.files:
            raise ValueError(f"{shown(folder)} has no images: give a folder of PNG or JPEG files")

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> Example:
        return Example({"image": epath.Path(self.files[number])}, os.fspath(self.files[number]))


def source_images(
    source: Any, field: Field, split: str, count: int, block: int = 64
) -> Iterator[UInt8[np.ndarray, "n h w C"]]:
    """Up to `count` images of a split, spread evenly over it, as the field's codec gets them, in blocks; bad rows are
    left out.

    Raises FileNotFoundError for missing files, ValueError for a split without an image.
    """
    host, shape = field.codec.host, field.codec.delivered
    rows, found, seen = rows_of(source, split), [], 0
    most = min(rows, count)
    for number in numbers_of(source, split, np.arange(most) * rows // max(most, 1)):
        with contextlib.suppress(BadRow):
            example = example_of(source, int(number))
            value = example.get(field.name) if field.name in example else example.get("image")
            if getattr(source, "holds", "pixels") == "pixels":
                found.append(fitted(value, example.where, shape[2], host.encode))
            elif value is not None:
                found.append(host.decode(value))
        if len(found) == block:
            seen += block
            yield np.stack(found)
            found = []
    if found:
        yield np.stack(found)
    if not seen + len(found):
        raise ValueError(f"split {split} of {type(source).__name__} has no image that can be read")


def through_codec(field: Field) -> Callable[[UInt8[np.ndarray, "n h w C"]], UInt8[np.ndarray, "n h w C"]]:
    """A function that encodes and decodes images by the field's codec, without noise: of a posterior its mean."""
    chain = field.codec
    frozen = FrozenLinks({} if chain.frozen is None else {field.name: chain.frozen})
    device = jax.jit(lambda value: chain.decode(chain.encode(value)))

    def there_and_back(images: np.ndarray) -> np.ndarray:
        inner = frozen.encode(field.name, scaled(images), None)
        return chain.host.decode(frozen.decode(field.name, np.asarray(device(jnp.asarray(inner))), None))

    return there_and_back


def reconstruction_scores(
    images: Iterator[UInt8[np.ndarray, "n h w C"]],
    back: Callable[[UInt8[np.ndarray, "n h w C"]], UInt8[np.ndarray, "n h w C"]],
    network: FeatureNetwork | None,
    told: Callable[[int], None] = lambda count: None,
) -> dict[str, float]:
    """psnr, psnr_std, ssim and ssim_std over images, `exact`, the share of images that come back as they were, `count`,
    and with a network `rfid` (of DINOv2 `rfd_dinov2`), the Fréchet distance between the features of the images and of
    what comes back.

    Raises ValueError for features that are not finite, and for less than two images.
    """
    outputs = {} if network is None else network.outputs
    moments = [FeatureMoments.none(outputs["pool"]) for _ in range(2)] if outputs else []
    noise, likeness, exact, count = [], [], 0, 0
    for block in images:
        made = back(block)
        noise.append(similarity.psnr(block, made))
        likeness.append(similarity.ssim(block, made))
        exact += int((block == made).all(axis=(1, 2, 3)).sum())
        count += len(block)
        for number, side in enumerate((block, made) if moments else ()):
            rgb = side.repeat(3, axis=3) if side.shape[3] == 1 else side
            rows = network.compute(rgb)["pool"]
            if not np.isfinite(rows).all():
                raise ValueError(f"features of {network.about['name']} are not finite: its file is damaged")
            moments[number] = moments[number].merge(FeatureMoments.of(rows))
        told(count)
    noise, likeness = np.concatenate(noise), np.concatenate(likeness)
    found = {"psnr": noise.mean(), "psnr_std": noise.std(), "ssim": likeness.mean(), "ssim_std": likeness.std()}
    found |= {"exact": exact / count, "count": count}
    if moments:
        (mean_x, x), (mean_y, y) = ((each.mean, each.covariance()) for each in moments)
        found["r" + network.names.get("fid", "fid")] = frechet_of_moments(mean_x, mean_y, x, y)
    return {name: float(value) for name, value in found.items()}
