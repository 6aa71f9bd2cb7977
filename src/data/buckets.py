"""Tasks whose images keep about their aspect ratio: each is cut to the nearest of some grids of patches."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from src.codecs.buckets import Buckets, as_grids
from src.data import documents, pictures
from src.data.example import Example
from src.data.files.latent_shards import PICTURES, moments_in_bucket
from src.interfaces import BucketField, Field, ImageField


def crop_to(pixels: UInt8[np.ndarray, "h w C"], height: int, width: int) -> UInt8[np.ndarray, "height width C"]:
    """The centre of an image, scaled as `pictures.crop` does until it covers height x width.

    Raises ValueError for an image that is more than `STRETCH` times as long as it is wide.
    """
    if max(pixels.shape[:2]) > pictures.STRETCH * min(pixels.shape[:2]):
        raise ValueError(f"{pixels.shape[1]} x {pixels.shape[0]} pixels are too long for their width")
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    size = max(round(image.width * scale), width), max(round(image.height * scale), height)
    found = np.asarray(image.resize(size, Image.Resampling.BICUBIC)).reshape(size[1], size[0], -1)
    top, left = (found.shape[0] - height) // 2, (found.shape[1] - width) // 2
    return found[top : top + height, left : left + width]


class _Bucketed:
    """What a task with pictures of one size needs to have them in buckets.

    buckets   grids (rows, columns) of patches, all with one product; the first one is that of `size`
    """

    def __init__(
        self,
        *arguments: Any,
        buckets: Sequence[Sequence[int]],
        patch: int = 2,
        **options: Any,
    ):
        super().__init__(*arguments, patch=patch, **options)
        self.buckets = Buckets(as_grids(buckets), patch)
        if self.image_shape is None or self.buckets.pixels(self.buckets.grids[0]) != self.image_shape[:2]:
            (height, width), have = self.buckets.pixels(self.buckets.grids[0]), (self.image_shape or (0, 0))[:2]
            size = f"size={height}, or " if height == width else ""
            raise ValueError(
                f"the first of the buckets {self.buckets.grids}, of patches of {patch} x {patch}, has images of"
                f" {height} x {width}, the task of {have[0]} x {have[1]}: give {size}a first bucket"
                f" {(have[0] // patch, have[1] // patch)}"
            )

    def fit(self, pixels: UInt8[np.ndarray, "h w C"]) -> dict[str, np.ndarray]:
        """The image in the shape of the first bucket, and its grid. Raises ValueError for one that is too narrow."""
        grid = self.buckets.nearest(*pixels.shape[:2])
        image = crop_to(pixels, *self.buckets.pixels(grid))
        return {"image": self.buckets.fold(image, grid), "image_grid": np.asarray(grid, np.int32)}

    def _moments(self, data: Any, where: str) -> dict[str, np.ndarray]:
        """What `fit` gives, of moments in one of the buckets. Raises BadRow."""
        grids = {self.buckets.pixels(grid): grid for grid in self.buckets.grids}
        values = moments_in_bucket(data, [*grids], self.image_shape[2], where)
        grid = grids[values.shape[:2]]
        return {"image": self.buckets.fold(values, grid), "image_grid": np.asarray(grid, np.int32)}

    def build(
        self, split: str, index: np.ndarray, uniforms: np.ndarray | None, extra: dict[str, np.ndarray]
    ) -> dict[str, Field]:
        """Fields of the rows, the images with their grids."""
        fields = super().build(split, index, uniforms, extra)
        return fields | {"image": _bucket(fields["image"], extra["image_grid"])}

    def blank(self) -> dict[str, np.ndarray]:
        """The arrays of a row that was refused; a grid is nowhere 0."""
        row = super().blank()
        lead = row["image"].shape[:-3]
        return row | {"image_grid": np.full((*lead, 2), self.buckets.grids[0], np.int32)}

    def fake(self, batch: int, seed: int) -> dict[str, Field]:
        """Random rows of the same spec, in all buckets."""
        rows = super().fake(batch, seed)
        lead, grids = rows["image"].values.shape[:-3], np.asarray(self.buckets.grids, np.int32)
        return rows | {"image": _bucket(rows["image"], grids[np.arange(math.prod(lead)).reshape(lead) % len(grids)])}


def _bucket(field: ImageField, grid: Any) -> BucketField:
    return BucketField(field.values, field.valid, grid)


class CaptionToImage(_Bucketed, pictures.CaptionToImage):
    """`pictures.CaptionToImage` in buckets."""

    name = "bucket_caption_to_image"

    def element_spec(self, batch: int) -> dict[str, Field]:
        """The fields of a batch as shapes and dtypes (jax.ShapeDtypeStruct), without touching any data."""
        spec = super().element_spec(batch)
        grid = jax.ShapeDtypeStruct((batch, 2), np.int32)
        return spec | {"image": _bucket(spec["image"], grid)}

    def _image_of(self, example: Example) -> dict[str, np.ndarray]:
        pictures = self.image_shape[2] in PICTURES
        return super()._image_of(example) if pictures else self._moments(example.image, example.where)


class Documents(_Bucketed, documents.Documents):
    """`documents.Documents` whose generated images are in buckets."""

    name = "bucket_documents"

    def _drawn(self, image: Any, where: str) -> dict[str, np.ndarray]:
        return super()._drawn(image, where) if self.image_shape[2] in PICTURES else self._moments(image, where)
