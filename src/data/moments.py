"""Shards that hold moments of latents instead of pictures: mean and log-variance of an autoencoder's posterior.

A record's picture is then float16 `[h, w, 2L]` in C order, and the manifest says in `schema.image` of which size the
pictures were, which shape the moments have, and the hash of the codec that made them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float16

from src.common.inside import shown
from src.data.ledger import BadRow

FORMAT = "moments"
DTYPE = np.dtype("<f2")
PICTURES = (1, 3)  # channels of pictures
MOST = 2**26  # numbers in one row


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a manifest says: pictures of `size` pixels a side, `shape` (h, w, 2L) of a row, and the codec's hash."""

    size: int
    shape: tuple[int, int, int]
    codec: str

    def told(self) -> dict[str, Any]:
        """The same for JSON."""
        return dataclasses.asdict(self) | {"format": FORMAT, "dtype": "float16", "shape": list(self.shape)}


def moments_of_manifest(image: Any) -> Moments | None:
    """What `schema.image` of a manifest says, None for pictures. Raises ValueError where it cannot be."""
    if not isinstance(image, dict) or image.get("format") != FORMAT:
        return None
    size, shape, codec = image.get("size"), image.get("shape"), image.get("codec")
    sides = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not sides or math.prod(shape) > MOST or type(size) is not int or not isinstance(codec, str):
        raise ValueError(f"it says of its moments {shown(image)}")
    return Moments(size, tuple(shape), codec)


def check_moments(moments: Moments | None, shape: tuple[int, int, int] | None, task: str, folder: str) -> None:
    """Raises ValueError where a task wants moments and the shards hold pictures, the reverse, or others."""
    wanted = shape if shape and shape[2] not in PICTURES else None
    if moments and wanted != moments.shape:
        height, width, channels = moments.shape
        size = f"size={height}" if height == width else f"height={height}, width={width}"
        raise ValueError(
            f"task {task}: {folder!r} holds moments of latents {height} x {width} x {channels}, and the task reads"
            f" {' x '.join(map(str, shape or ())) or 'no images'}: set {size}, channels={channels} in tasks.<name>.data"
        )
    if wanted and not moments:
        raise ValueError(
            f"task {task} wants {wanted[2]} channels, and {folder!r} holds pictures: set size to pixels and channels=3,"
            " or make latents of them (python -m src.tools.latents --help)"
        )


def moments_of(data: Any, shape: tuple[int, int, int], where: str) -> Float16[np.ndarray, "h w D"]:
    """A row's moments. Raises BadRow for what has another number of bytes, or values that are not finite."""
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * DTYPE.itemsize:
        found = f"{len(data):,} bytes" if isinstance(data, bytes) else "no bytes"
        raise BadRow("there are no such moments", where, f"{found} instead of {math.prod(shape) * DTYPE.itemsize:,}")
    values = np.frombuffer(data, DTYPE).reshape(shape).astype(np.float16)
    if not np.isfinite(values).all():
        raise BadRow("the moments are not finite", where)
    return values


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A plan (`prepare.Plan`) that writes the moments of pictures.

    moments   what the manifest will say
    rows      rows of the source for each shard
    batch     pictures that `encode` takes at a time
    read      (example) -> its pixels uint8 `[size, size, 3]`, or raises BadRow
    encode    pixels `[batch, size, size, 3]` uint8 -> moments `[batch, h, w, 2L]`
    write     (what is told, bytes) -> a record
    threads   that read pictures, while others are encoded
    precision of the computation, which the moments show in their last digits
    """

    moments: Moments
    rows: int
    batch: int
    read: Callable[[Any], np.ndarray]
    encode: Callable[[np.ndarray], Any]
    write: Callable[[dict[str, Any], bytes], bytes]
    threads: int = 4
    precision: str = "float32"

    def told(self) -> dict[str, Any]:
        """What must be the same when the work goes on."""
        return {"rows": self.rows, "precision": self.precision} | self.moments.told()

    def image(self) -> dict[str, Any]:
        """What the manifest says of the pictures."""
        return self.moments.told()

    def records(self, source: Any, rows: Sequence[int]) -> Iterator[tuple[int, bytes | BadRow]]:
        """The records of some rows, in their order; the next pictures are read while some are encoded."""
        chunks = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        with ThreadPoolExecutor(self.threads) as pool:
            waiting = [pool.submit(self._read, source, row) for chunk in chunks[:2] for row in chunk]
            for number, chunk in enumerate(chunks):
                found = [future.result() for future in waiting[: len(chunk)]]
                ahead = chunks[number + 2] if number + 2 < len(chunks) else ()
                waiting = waiting[len(chunk) :] + [pool.submit(self._read, source, row) for row in ahead]
                yield from zip(chunk, self._records(found), strict=True)

    def _read(self, source: Any, row: int) -> tuple[dict[str, Any], str, np.ndarray] | BadRow:
        try:
            example = source[row]
            return example.told, example.where, self.read(example)
        except BadRow as flaw:
            return flaw

    def _records(self, found: Sequence[Any]) -> Iterator[bytes | BadRow]:
        """The records of one batch; it is filled up with its last picture, so that all batches have one shape."""
        good = [pixels for row in found if not isinstance(row, BadRow) for pixels in row[2:]]
        if good:
            batch = np.stack(good + good[-1:] * (self.batch - len(good)))
            with np.errstate(over="ignore"):  # what is too large for float16 is told below
                values = iter(np.asarray(self.encode(batch)).astype(DTYPE)[: len(good)])
        for row in found:
            if isinstance(row, BadRow):
                yield row
                continue
            value, where = next(values), row[1]
            if value.shape != self.moments.shape:
                raise ValueError(f"the codec gives {value.shape} for a picture, expected {self.moments.shape}")
            if not np.isfinite(value).all():
                yield BadRow("the moments are not finite", where)
            else:
                yield self.write(row[0], value.tobytes())
