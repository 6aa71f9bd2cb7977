"""Shards that hold moments of latents instead of images: mean and log-variance of an autoencoder's posterior.

A record's image is then float16 `[h, w, 2L]` in C order, and the manifest says in `schema.image` of which size the
images were, which shape the moments have, and the hash of the codec that made them.

Of images in buckets (`codecs/buckets.py`) the manifest lists `buckets`, height and width of the moments of each; the
moments of all are as many numbers, and height and width stand before them, two whole numbers of 16 bits.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Float16

from src.codecs.buckets import Buckets
from src.common.files.paths import shown
from src.data.example import BadRow, Example
from src.data.splits import example_of

FORMAT = "moments"
DTYPE = np.dtype("<f2")
MOST = 2**26  # numbers in one row
SIDE = np.dtype("<u2")
HELD = 8  # batches of rows that wait until there are enough images of one size
Sides = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Moments:
    """What a manifest says: images of `size` pixels a side, `shape` (h, w, 2L) of a row, and the codec's hash.

    buckets   height and width of the moments in each bucket, the first those of `shape`; empty: there is one size
    """

    size: int
    shape: tuple[int, int, int]
    codec: str
    buckets: tuple[Sides, ...] = ()

    def told(self) -> dict[str, Any]:
        """The same for JSON."""
        told = dataclasses.asdict(self) | {"format": FORMAT, "dtype": "float16", "shape": list(self.shape)}
        more = {"buckets": [list(sides) for sides in self.buckets]} if self.buckets else {}
        return {key: value for key, value in told.items() if key != "buckets"} | more


def moments_of_manifest(image: Any) -> Moments | None:
    """What `schema.image` of a manifest says, None for images. Raises ValueError where it cannot be."""
    if not isinstance(image, dict) or image.get("format") != FORMAT:
        return None
    size, shape, codec = image.get("size"), image.get("shape"), image.get("codec")
    sides = isinstance(shape, list) and len(shape) == 3 and all(type(n) is int and n > 0 for n in shape)
    if not sides or math.prod(shape) > MOST or type(size) is not int or not isinstance(codec, str):
        raise ValueError(f"it says of its moments {shown(image)}")
    return Moments(size, tuple(shape), codec, _buckets(image.get("buckets", []), tuple(shape)))


def _buckets(told: Any, shape: tuple[int, int, int]) -> tuple[Sides, ...]:
    pairs = isinstance(told, list) and all(isinstance(sides, list) and len(sides) == 2 for sides in told)
    if not pairs or not all(type(side) is int and 0 < side < 2**16 for sides in told for side in sides):
        raise ValueError(f"it says of its buckets {shown(told)}")
    found = tuple((height, width) for height, width in told)
    if found and (found[0] != shape[:2] or len({height * width for height, width in found}) > 1):
        raise ValueError(f"its buckets {shown(told)} do not go with moments {shape[0]} x {shape[1]}")
    return found


def check_moments(moments: Moments | None, shape: tuple[int, int, int] | None, buckets: Buckets | None) -> None:
    """Raises ValueError where a task reads moments of `shape` and the shards hold images, the reverse (`shape` is
    None), others, or those of other buckets."""
    if moments is None:
        if shape:
            raise ValueError(
                "source.moments is True and the shards hold images: set it to False, or make moments of them"
                " (python -m src.tools.latents --help)"
            )
        return
    sides = " x ".join(map(str, moments.shape))
    if shape is None:
        raise ValueError(f"the shards hold moments of latents {sides}: set source.moments=True")
    if shape != moments.shape:
        raise ValueError(
            f"the shards hold moments of latents {sides}, and the field's codec makes {' x '.join(map(str, shape))}:"
            " set its sizes to theirs, or make them anew (python -m src.tools.latents --help)"
        )
    want = tuple(map(buckets.pixels, buckets.grids)) if buckets else ()
    if set(moments.buckets) != set(want):
        raise ValueError(
            f"the shards hold moments of {_said(moments.buckets)}, and the task reads {_said(want)}: give the template"
            " those buckets, or make moments for these (python -m src.tools.latents --help)"
        )


def _said(buckets: tuple[Sides, ...]) -> str:
    return f"the buckets {', '.join(f'{h} x {w}' for h, w in buckets)}" if buckets else "no buckets"


def moments_of(data: Any, shape: tuple[int, int, int], where: str) -> Float16[np.ndarray, "h w D"]:
    """A row's moments. Raises BadRow for what has another number of bytes, or values that are not finite."""
    if not isinstance(data, bytes) or len(data) != math.prod(shape) * DTYPE.itemsize:
        found = f"{len(data):,} bytes" if isinstance(data, bytes) else "no bytes"
        raise BadRow("there are no such moments", where, f"{found} instead of {math.prod(shape) * DTYPE.itemsize:,}")
    values = np.frombuffer(data, DTYPE).reshape(shape).astype(np.float16)
    if not np.isfinite(values).all():
        raise BadRow("the moments are not finite", where)
    return values


def moments_in_bucket(
    data: Any, buckets: Sequence[Sides], channels: int, where: str
) -> Float16[np.ndarray, "height width D"]:
    """A row's moments in one of the buckets, heights and widths. Raises BadRow, also for one of no bucket."""
    head = data[: 2 * SIDE.itemsize] if isinstance(data, bytes) else b""
    sides = tuple(np.frombuffer(head, SIDE).tolist()) if len(head) == 2 * SIDE.itemsize else ()
    if sides not in buckets:
        raise BadRow("the moments are of no bucket", where, " x ".join(map(str, sides)))
    return moments_of(data[len(head) :], (*sides, channels), where)


@dataclasses.dataclass(frozen=True)
class Encoding:
    """A plan (`prepare.ShardPlan`) that writes the moments of images.

    moments   what the manifest will say
    rows      rows of the source for each shard
    batch     images that `encode` takes at a time
    read      (kind, example) -> of each image its pixels uint8 `[height, width, 3]`, or the file of one that stays
              as it is; or raises BadRow
    encode    pixels `[batch, height, width, 3]` uint8 -> moments `[batch, h, w, 2L]`
    write     (kind, example, bytes of the images) -> a record
    threads   that read images, while others are encoded
    precision of the computation, which the moments show in their last digits
    """

    moments: Moments
    rows: int
    batch: int
    read: Callable[[str, Any], list[np.ndarray | bytes]]
    encode: Callable[[np.ndarray], Any]
    write: Callable[[str, Example, list[bytes]], bytes]
    threads: int = 4
    precision: str = "float32"

    def told(self) -> dict[str, Any]:
        """What must be the same when the work goes on."""
        return {"rows": self.rows, "precision": self.precision} | self.moments.told()

    def image(self) -> dict[str, Any]:
        """What the manifest says of the images."""
        return self.moments.told()

    def records(self, source: Any, kind: str, rows: Sequence[int]) -> Iterator[tuple[int, bytes | BadRow]]:
        """The records of some rows, in their order; the next images are read while some are encoded.

        Images of one size are encoded together, as soon as there are enough of them.
        """
        line: deque[_Row] = deque()  # what is not given away yet
        groups: dict[tuple[int, ...], list[tuple[_Row, int]]] = {}
        with ThreadPoolExecutor(self.threads) as pool:
            for row in self._read_ahead(pool, source, kind, rows):
                line.append(row)
                for place, pixels in row.waiting():
                    group = groups.setdefault(pixels.shape, [])
                    group.append((row, place))
                    if len(group) == self.batch:
                        self._encode(groups.pop(pixels.shape))
                if len(line) > HELD * self.batch:
                    for shape in {pixels.shape for _, pixels in line[0].waiting()} & groups.keys():
                        self._encode(groups.pop(shape))
                while line and line[0].done:
                    yield line[0].number, self._record(kind, line.popleft())
            for group in groups.values():
                self._encode(group)
            yield from ((row.number, self._record(kind, row)) for row in line)

    def _read_ahead(self, pool: ThreadPoolExecutor, source: Any, kind: str, rows: Sequence[int]) -> Iterator[_Row]:
        """The rows with their images, in order; those of two batches are read ahead."""
        waiting: deque[Future[_Row]] = deque()
        for number in rows:
            waiting.append(pool.submit(self._read, source, kind, number))
            if len(waiting) > 2 * self.batch:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    def _read(self, source: Any, kind: str, number: int) -> _Row:
        try:
            example = example_of(source, number)
            return _Row(number, example, self.read(kind, example))
        except BadRow as flaw:
            return _Row(number, flaw=flaw)

    def _encode(self, group: list[tuple[_Row, int]]) -> None:
        """Encodes images of one size; they are filled up with the last one, so that all batches of a size have one
        shape."""
        pixels = [row.images[place] for row, place in group]
        with np.errstate(over="ignore"):  # what is too large for float16 is told below
            values = np.asarray(self.encode(np.stack(pixels + pixels[-1:] * (self.batch - len(group))))).astype(DTYPE)
        sizes = self.moments.buckets or (self.moments.shape[:2],)
        if values.shape[1:3] not in sizes or values.shape[3:] != self.moments.shape[2:]:
            raise ValueError(f"the codec gives {values.shape[1:]} for an image, expected {self.moments.shape}")
        head = np.asarray(values.shape[1:3], SIDE).tobytes() if self.moments.buckets else b""
        for (row, place), value in zip(group, values, strict=False):
            row.images[place] = head + value.tobytes()
            if not np.isfinite(value).all():
                row.flaw = row.flaw or BadRow("the moments are not finite", row.example.where)

    def _record(self, kind: str, row: _Row) -> bytes | BadRow:
        return row.flaw or self.write(kind, row.example, row.images)


@dataclasses.dataclass
class _Row:
    """A row on its way: its images as pixels, then as bytes."""

    number: int
    example: Example = dataclasses.field(default_factory=lambda: Example({}))
    images: list[np.ndarray | bytes] = dataclasses.field(default_factory=list)
    flaw: BadRow | None = None

    def waiting(self) -> list[tuple[int, np.ndarray]]:
        """The images that are to be encoded, with their places."""
        return [(place, p) for place, p in enumerate(self.images) if not isinstance(p, bytes)]

    @property
    def done(self) -> bool:
        return not self.waiting()
