"""A folder of generated images: shards in ADM's form of samples, and what they were made with.

`about.json` says what was asked for and with which weights. `00000.npz`, … have `arr_0`, images uint8 [n, h, w, 3], and
`arr_1`, the class of each, where there are classes. Each shard has a seed of its own, so that a job that was stopped
goes on with the shards that are missing, and gives the images of one that was not.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from jaxtyping import Int, UInt8

from src.common.files.npz import Npz, write_npz
from src.common.files.paths import shown
from src.common.files.store import write_named
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.evals.scores.statistics import LABELS, SAMPLES

ABOUT = "about.json"
FREE = ("version", "workdir")  # may differ when a job goes on


class DrawnImages:
    """The folder of a job; `count` images in shards of `rows`.

    Raises ValueError where the folder holds another job, or what is none.
    """

    def __init__(self, folder: epath.Path, about: Mapping[str, Any], count: int, rows: int):
        self.folder, self.count, self.rows = folder, count, rows
        self.about = json.loads(json.dumps({**about, "count": count, "rows": rows}))
        path = folder / ABOUT
        if path.exists():
            before = read_json(path, what="description")
            wanted = {name: value for name, value in self.about.items() if name not in FREE}
            wrong = [name for name, value in wanted.items() if before.get(name) != value]
            if wrong:
                told = listed([f"{name} {shown(before.get(name))}, now {shown(wanted[name])}" for name in wrong])
                raise ValueError(f"{os.fspath(folder)!r} holds other images ({told}): give another --out, or remove it")
        elif folder.is_dir() and any(folder.iterdir()):
            raise ValueError(f"{os.fspath(folder)!r} is not empty and has no {ABOUT}: give another --out")

    def begin(self) -> None:
        """Writes `about.json`."""
        if not (self.folder / ABOUT).exists():
            write_named(self.folder / ABOUT, (json.dumps(self.about, indent=2) + "\n").encode(), "description")

    def missing(self) -> list[int]:
        """Numbers of the shards that are still to be made."""
        return [number for number in range(-(-self.count // self.rows)) if not self._path(number).exists()]

    def rows_of(self, number: int) -> range:
        """Numbers of the images of a shard."""
        return range(number * self.rows, min((number + 1) * self.rows, self.count))

    def seed_of(self, number: int) -> int:
        """The seed of a shard's noise."""
        return int(np.random.SeedSequence([int(self.about["seed"]), number]).generate_state(1)[0])

    def write(self, number: int, images: UInt8[np.ndarray, "n h w C"], labels: Int[np.ndarray, " n"] | None) -> None:
        """Writes a shard, whole or not at all; images of one channel become grey ones. Raises OSError."""
        arrays = {SAMPLES: images.repeat(3, axis=3) if images.shape[3] == 1 else images}
        arrays |= {} if labels is None else {LABELS: labels}
        data = io.BytesIO()
        np.savez(data, **arrays)
        write_named(self._path(number), data.getvalue(), "shard of images")

    def _path(self, number: int) -> epath.Path:
        return self.folder / f"{number:05d}.npz"


def read_about(folder: epath.Path) -> dict[str, Any]:
    """What a folder of generated images was made with. Raises ValueError where images are missing, or for no folder of
    a job."""
    about = read_json(folder / ABOUT, what="description")
    count, rows = about.get("count"), about.get("rows")
    if not (type(count) is int and type(rows) is int and count > 0 and rows > 0):
        raise ValueError(f"{os.fspath(folder / ABOUT)!r} has no count and rows: draw the images anew")
    names = [f"{number:05d}.npz" for number in range(-(-count // rows))]
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{len(missing)} of the {len(names)} shards of {os.fspath(folder)!r} are missing, such as {missing[0]}: the"
            " command that drew them goes on from there"
        )
    return about | {"shards": names}


def check_expected(about: Mapping[str, Any] | None, expected: Sequence[str]) -> None:
    """Raises ValueError, in one sentence, where images were drawn with something else than `expected`, such as
    `guidance.scale=1.5` or `ema=true`; dots go into groups of `about.json`. None: nothing is known of the images."""
    for each in expected:
        name, sign, wanted = each.partition("=")
        if not sign or not name:
            raise ValueError(f"--expect={each} is no name=value; write --expect=guidance.scale=1.5,ema=true")
        if about is None:
            raise ValueError(f"--expect={each}: the folder has no {ABOUT}, which says what its images were drawn with")
        value: Any = about
        for part in name.split("."):
            if not isinstance(value, Mapping) or part not in value:
                have = listed(list(value)) if isinstance(value, Mapping) else "no parts"
                raise ValueError(f"--expect={each}: {ABOUT} has no {part!r}, but {have}")
            value = value[part]
        with contextlib.suppress(json.JSONDecodeError):
            wanted = json.loads(wanted)
        if wanted != value or isinstance(wanted, bool) != isinstance(value, bool):
            raise ValueError(f"--expect={each}: the images were drawn with {name}={json.dumps(value)}")


def read_drawn(folder: epath.Path, block: int = 256) -> Iterator[UInt8[np.ndarray, "n h w 3"]]:
    """All images of a folder in their order, in blocks. Raises ValueError as `read_about`, and for damage."""
    for name in read_about(folder)["shards"]:
        yield from Npz(folder / name).blocks(SAMPLES, block)


def join(folder: epath.Path, path: str | os.PathLike[str]) -> None:
    """One file with all images and classes of a folder, as ADM's evaluator reads it. Raises ValueError as `read_drawn`,
    OSError where it cannot be written."""
    files = [Npz(folder / name) for name in read_about(folder)["shards"]]
    count = sum(file.shape(SAMPLES)[0] for file in files)
    shapes: dict[str, Any] = {SAMPLES: ((count, *files[0].shape(SAMPLES)[1:]), np.uint8)}
    if LABELS in files[0].names():
        shapes[LABELS] = ((count,), np.int64)
    write_npz(path, shapes, lambda name: itertools.chain.from_iterable(file.blocks(name, 256) for file in files))


def draw(
    images: DrawnImages,
    make: Callable[[range, int], UInt8[np.ndarray, "n h w C"]],
    labels: Int[np.ndarray, " n"] | None,
    told: Callable[[int], None],
    first: bool,
) -> None:
    """Makes and writes the missing shards.

    make    images of these numbers, with this seed; called on all processes
    labels  of all images
    told    is called with the number of finished images
    first   whether this process writes
    """
    if first:
        images.begin()
    for number in images.missing():
        rows = images.rows_of(number)
        made = make(rows, images.seed_of(number))
        if first:
            images.write(number, made, None if labels is None else labels[rows.start : rows.stop])
        told(rows.stop)
