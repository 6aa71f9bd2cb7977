"""Images with captions in ArrayRecord shards: few large files with a checksum for each row.

A record is the length of its header (4 bytes, little endian), the header, JSON {"caption": "two red pears"}, and the
bytes of a PNG or JPEG file. `manifest.json` lists the shards with their rows and bytes, so that a shard that is
missing, empty, truncated or damaged where it is indexed is refused by name before the first step. A damaged record is
a bad row.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from src.common.files import is_remote, local_copy, write_whole
from src.common.inside import inside
from src.common.strict_json import read_json
from src.common.tree import listed
from src.data import pictures
from src.data.ledger import BadRow
from src.data.pictures import Pair, caption_of, parse_example

MANIFEST = "manifest.json"
FORMAT = 1
OPTIONS = "group_size:1"  # a record has its own checksum: damage spoils no other


class Shards:
    """The rows of a folder of shards by number.

    Raises FileNotFoundError without a manifest, ValueError, naming every shard that is missing or damaged.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        shards = _manifest(folder)
        self.names = [shard["name"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        self._readers: dict[int, Any] = {}
        self._lock = threading.Lock()
        wrong = [f"{shard['name']} {reason}" for shard in shards if (reason := self._flaw(**shard))]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(shards)} shards of {os.fspath(folder)!r} cannot be used: {listed(wrong)};"
                " copy them again from their source, or write them anew"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Pair:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = index - int(self._starts[shard])
        where = f"{self.names[shard]} record {record}"
        with self._lock:
            try:
                if shard not in self._readers:
                    self._readers[shard] = _open(local_copy(self.folder / self.names[shard]))
                data = self._readers[shard].read([record])[0]
            except RuntimeError as error:
                raise BadRow("the record is damaged", where, error) from error
        end = 4 + int.from_bytes(data[:4], "little")
        if end > min(len(data), pictures.LINE_BYTES):
            raise BadRow("the record is cut off", where, f"{len(data)} of {end} bytes")
        return Pair(where, caption_of(parse_example(data[4:end], where), where), data[end:])

    def _flaw(self, name: str, rows: int, bytes: int) -> str:  # the names of the manifest
        """Why a shard cannot be used, or ""."""
        path = self.folder / name
        try:
            size = path.stat().length
        except FileNotFoundError:
            return "is missing"
        if size != bytes:
            return f"has {size:,} of {bytes:,} bytes"
        if is_remote(path):  # looking into it would copy it
            return ""
        reader = _open(path)
        try:
            return "" if reader.ok() and reader.num_records() == rows else "has a damaged index"
        finally:
            _close(reader)


def _manifest(folder: epath.Path) -> list[dict[str, Any]]:
    path = folder / MANIFEST
    try:
        told = read_json(path, limit=1 << 28, what="manifest")
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{os.fspath(path)!r} does not exist: give a folder of shards with a manifest"
        ) from error
    try:
        if told["format"] != FORMAT:
            raise ValueError(f"its format is {told['format']!r}, this version reads {FORMAT}")
        shards = [{"name": s["name"], "rows": s["rows"], "bytes": s["bytes"]} for s in told["shards"]]
        for shard in shards:
            inside(folder, shard["name"])
            if not all(type(shard[key]) is int and 0 <= shard[key] < 2**50 for key in ("rows", "bytes")):
                raise ValueError(f"{shard} has no sizes")
        return shards
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no manifest of shards ({error}): write the shards anew") from error


def write_shards(
    folder: str | os.PathLike[str], examples: Iterable[tuple[str, bytes]], rows: int = 1000
) -> dict[str, Any]:
    """Writes (caption, bytes of an image file) examples into shards of `rows` rows, and returns the manifest.

    The manifest comes last, so that a folder that was not finished is refused. Raises FileExistsError where there is
    one already.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    target = epath.Path(folder)
    if (target / MANIFEST).exists():
        raise FileExistsError(f"{os.fspath(target)!r} has shards already: give another folder")
    target.mkdir(parents=True, exist_ok=True)
    shards, stream = [], iter(examples)
    for number in itertools.count():
        part = list(itertools.islice(stream, rows))
        if not part:
            break
        path = target / f"{number:05d}.arrayrecord"
        writer = ArrayRecordWriter(os.fspath(path), OPTIONS)
        for caption, image in part:
            header = json.dumps({"caption": caption}).encode()
            writer.write(len(header).to_bytes(4, "little") + header + image)
        writer.close()
        shards.append({"name": path.name, "rows": len(part), "bytes": path.stat().length})
    manifest = {"format": FORMAT, "shards": shards}
    write_whole(target / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def _open(path: Any) -> Any:
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fspath(path))


def _close(reader: Any) -> None:
    try:
        reader.close()
    except RuntimeError:  # it tells of the damage again
        return


class CaptionToImage(pictures.CaptionToImage):
    """`pictures.CaptionToImage` from shards."""

    name = "record_caption_to_image"
    pairs = Shards


class ImageToCaption(pictures.ImageToCaption):
    """`pictures.ImageToCaption` from shards."""

    name = "record_image_to_caption"
    pairs = Shards
