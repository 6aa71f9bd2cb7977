"""The images of a template: files, arrays or moments of latents, as the row keeps them and as the batch has them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from src.codecs.buckets import Buckets, as_grids
from src.codecs.pixels import crop, scaled
from src.common.files.images import read_image
from src.data.example import BadRow, Row, Source
from src.data.files.latent_shards import check_moments, moments_in_bucket, moments_of
from src.data.orders import Orders, row_generator
from src.interfaces import Field, Tokens
from src.sequence.segment import Segment

CHANNELS = (1, 3)  # of pixels: grey, or RGB
HOLDS = ("pixels", "values", "moments")


def delivered(field: Field, holds: str) -> tuple[int, int, int]:
    """Shape (h, w, C) of what the data deliver of an image: before the frozen network, or, of moments, instead of what
    it computes.

    Raises ValueError where a source has moments and the field no autoencoder.
    """
    chain = field.codec
    if holds != "moments":
        return chain.delivered
    if chain.frozen is None:
        raise ValueError(f"the source has moments of latents, but fields.{field.name}.codec has no autoencoder")
    height, width, channels = chain.frozen.shape
    return height, width, 2 * channels


class Images:
    """The images of one name.

    made      they are targets; else they are only read
    always    their tokens are there in every row; else those of a row without an image are padding
    source    says what it holds, see `example.py`
    encoded   they are moments where the source has such; else files all the same (images that are only read)
    given     first tokens, in the order of the rows, that are given where the others are made
    buckets   grids (rows, columns) of tokens, all with one product, the first one the field's: each image keeps about
              its aspect ratio, and is cut to the nearest of them
    order, splits   of the tokens of each row, see `orders.Orders`
    options   of the segment

    Raises ValueError for what does not go together.
    """

    def __init__(
        self,
        name: str,
        field: Field,
        source: Source,
        *,
        made: bool,
        always: bool = True,
        encoded: bool = True,
        given: int = 0,
        buckets: Sequence[Sequence[int]] = (),
        order: str = "rows",
        splits: Any = (),
        **options: Any,
    ):
        self.name, self.field, self.made, self.always = name, field.name, made, always
        self.holds = getattr(source, "holds", "pixels")
        if self.holds not in HOLDS:
            raise ValueError(f"the source holds {self.holds!r}; it may hold {', '.join(HOLDS)}")
        if self.holds == "moments" and not encoded:
            self.holds = "pixels"
        if given and (order != "rows" or splits):
            raise ValueError(f"given={given} first tokens of {name!r} go with order='rows' and no splits alone")
        self.encoded, self.given = encoded, given
        self.shape, self.count, self.grid = delivered(field, self.holds), field.spec.tokens, field.spec.grid
        self.buckets = _buckets(buckets, field, self.shape) if buckets else None
        first = field.codec.host
        self._own = first.where == "frozen"  # a network that prepares pixels itself, as floats
        self._fit = first.preprocess if self._own else getattr(first, "encode", None)
        floats = {"values": np.float32, "moments": np.float16}
        self.dtype = np.dtype(floats.get(self.holds, np.float32 if self._own else np.uint8))
        if not 0 <= given < self.count:
            raise ValueError(f"given={given} of {self.count} tokens of {name!r} leaves nothing to be made: give less")
        self.segment = Segment((name,), self.count, **options)
        self.orders = Orders(order, splits if isinstance(splits, int | float | str) else tuple(splits))
        self.orders.check(self.count)
        self.draws = int(self.orders.drawn)  # uniform numbers of a row

    def check(self, source: Source) -> None:
        """Looks at a source before its first row. Raises ValueError for shards of something else, and for a codec whose
        channels no image has."""
        if self.holds == "pixels" and len(self.shape) == 3 and self.shape[2] not in CHANNELS:
            raise ValueError(f"fields.{self.field}.codec: channels={self.shape[2]}; images have 1 or 3")
        if self.encoded and hasattr(source, "moments"):
            check_moments(source.moments, self.shape if self.holds == "moments" else None, self.buckets)
        shape = getattr(source, "image_shape", self.shape)
        if shape != self.shape:
            raise ValueError(
                f"the images are {shape} and the field's codec takes {self.shape}: set its sizes to theirs"
            )
        if self.buckets and getattr(source, "cut", None):
            raise ValueError(
                f"the template has buckets, and the images were cut to squares of {source.cut} pixels: prepare them"
                " anew without --size"
            )

    def row(self, image: Any, where: str, *, prompt: bool = False) -> Row:
        """The arrays of an image. Raises BadRow."""
        flags = {f"{self.name}/there": np.asarray(True), f"{self.name}/target": np.asarray(self.made and not prompt)}
        return self._load(image, where) | flags

    def absent(self, make: bool = False, grid: Any = None) -> Row:
        """The arrays of a row without an image, or of one whose image is to be made, in one of the buckets.

        Raises ValueError for a grid of another number of tokens.
        """
        row = self._nothing() | {f"{self.name}/target": np.asarray(make)}
        if grid is not None:
            if self.buckets is None or grid[0] * grid[1] != self.count:
                raise ValueError(f"grid={tuple(grid)} has not {self.count} tokens, or the template has no buckets")
            row[f"{self.name}/grid"] = np.asarray(grid, np.int32)
        return row

    def blank(self) -> Row:
        """The arrays of a row that was refused."""
        return self._nothing() | self.ordered(0, prompt=False)

    def ordered(self, index: int, *, prompt: bool, uniform: float | None = None) -> Row:
        """Order and blocks of the row `index`, where rows have their own, in training by a uniform number; a prompt has
        no blocks: those of the decoder."""
        if not self.orders.drawn:
            return {}
        order, block = self.orders.draw(row_generator(uniform, index), self.count)
        row = {f"{self.name}/order": order}
        return row if prompt or block is None else row | {f"{self.name}/block": block}

    def tokens(self, rows: Mapping[str, np.ndarray]) -> Tokens:
        """The tokens of stacked rows: pixels in [-1, 1], other values as they are; float32."""
        there, target = rows[f"{self.name}/there"], rows[f"{self.name}/target"]
        value = rows[self.name]
        value = scaled(value) if value.dtype == np.uint8 else value.astype(np.float32)
        value = np.where(there[..., None, None, None], value, np.float32(0))
        spread = lambda flags: np.repeat(flags[..., None], self.count, axis=-1)
        place = None
        if self.buckets:
            columns = rows[f"{self.name}/grid"][..., 1:]
            numbers = np.arange(self.count, dtype=np.int32)
            place = np.stack([numbers // columns, numbers % columns], axis=-1)
        order = rows.get(f"{self.name}/order")
        if order is not None and place is None:
            place = np.stack(np.unravel_index(order, self.grid), axis=-1).astype(np.int32)
        elif order is not None:
            place = np.take_along_axis(place, order[..., None], axis=-2)
        block, wanted = rows.get(f"{self.name}/block"), spread(target)
        wanted[..., : self.given] = False
        return Tokens(value, spread(there | target | self.always), wanted, place, block)

    def made_up(self) -> np.ndarray:
        """An image as an example has it, that needs no data."""
        shape = (*self.shape[:2], 3) if self._own else self.shape
        return np.zeros(shape, np.uint8 if self.holds == "pixels" else self.dtype)

    def invent(self, rng: np.random.Generator, number: int, target: bool) -> Row:
        """A random image, in each of the buckets in turn."""
        if self.dtype == np.uint8:
            value = rng.integers(0, 256, self.shape).astype(np.uint8)
        else:
            value = rng.standard_normal(self.shape).astype(self.dtype)
        row = self._nothing() | self.ordered(number, prompt=False) | {self.name: value}
        if self.buckets:
            grids = self.buckets.grids
            row[f"{self.name}/grid"] = np.asarray(grids[number % len(grids)], np.int32)
        return row | {f"{self.name}/there": np.asarray(True), f"{self.name}/target": np.asarray(target)}

    def _nothing(self) -> Row:
        row = {f"{self.name}/{kind}": np.asarray(False) for kind in ("there", "target")}
        if self.buckets:
            row[f"{self.name}/grid"] = np.asarray(self.buckets.grids[0], np.int32)
        return row | {self.name: np.zeros(self.shape, self.dtype)}

    def _load(self, image: Any, where: str) -> Row:
        if self.holds == "pixels":
            return fitted(image, where, self.shape[2], self._bucketed if self.buckets else self._whole)
        if self.holds == "moments" and isinstance(image, bytes):
            if not self.buckets:
                return {self.name: moments_of(image, self.shape, where)}
            sides = [self.buckets.pixels(grid) for grid in self.buckets.grids]
            image = moments_in_bucket(image, sides, self.shape[2], where)
        value = np.asarray(image)
        grids = {self.buckets.pixels(grid): grid for grid in self.buckets.grids} if self.buckets else {}
        fits = value.shape == self.shape or (value.shape[2:] == self.shape[2:] and value.shape[:2] in grids)
        if not fits or not np.issubdtype(value.dtype, np.floating):
            raise BadRow("the image has another shape", where, f"{value.dtype} {value.shape} instead of {self.shape}")
        if not self.buckets:
            return {self.name: value.astype(self.dtype)}
        return self._folded(value.astype(self.dtype), grids[value.shape[:2]])

    def _whole(self, pixels: np.ndarray) -> Row:
        return {self.name: np.asarray(self._fit(pixels), self.dtype)}

    def _bucketed(self, pixels: np.ndarray) -> Row:
        grid = self.buckets.nearest(*pixels.shape[:2])
        return self._folded(crop(pixels, *self.buckets.pixels(grid)), grid)

    def _folded(self, value: np.ndarray, grid: tuple[int, int]) -> Row:
        return {self.name: self.buckets.fold(value, grid), f"{self.name}/grid": np.asarray(grid, np.int32)}


def _buckets(grids: Sequence[Sequence[int]], field: Field, shape: tuple[int, int, int]) -> Buckets:
    """Buckets whose first grid is the field's. Raises ValueError."""
    found, own = as_grids(grids), field.spec.grid
    if found[0] != own:
        raise ValueError(
            f"the first of the buckets is {found[0]}, and the images of fields.{field.name} have a grid of {own}: begin"
            " with that, or change the sizes of the field's codec"
        )
    return Buckets(found, shape[0] // own[0])


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


def shift_images(images: np.ndarray, offsets: np.ndarray, background: float) -> np.ndarray:
    """Images [B, h, w, C] moved by whole pixels, `offsets` [B, 2] down and right; what enters is `background`."""
    count, height, width, channels = images.shape
    margin = int(np.abs(offsets).max(initial=0))
    padded = np.full((count, height + 2 * margin, width + 2 * margin, channels), background, images.dtype)
    padded[:, margin : margin + height, margin : margin + width] = images
    rows = np.arange(height)[None] + margin - offsets[:, :1]
    columns = np.arange(width)[None] + margin - offsets[:, 1:]
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def shifts(uniforms: np.ndarray, most: int) -> np.ndarray:
    """Offsets in -most .. most from uniform numbers in [0, 1), same shape."""
    return choose(uniforms, 2 * most + 1) - most


def choose(uniform: np.ndarray, count: int) -> np.ndarray:
    """Uniform choices in 0 .. count-1 from uniform numbers in [0, 1)."""
    return (uniform * count).astype(np.int64)
