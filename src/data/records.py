"""Examples in ArrayRecord shards: few large files with a checksum for each row.

A record is the length of its header (4 bytes, little endian), the header, a JSON object of what is told of the picture
({"caption": "two red pears"}, or as `examples` says for the other kinds), and the bytes of the picture's file (PNG,
JPEG), if there is one. `manifest.json` lists the shards with their rows, bytes and SHA-256, so that a shard that is
missing, empty, truncated or damaged where it is indexed is refused by name before the first step, and says in `schema`
what kind of examples they are. A damaged record is a bad row.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import threading
from collections.abc import Iterable
from typing import Any

import numpy as np
from etils import epath

from src.common.files import is_remote, local_copy, write_whole
from src.common.inside import inside, shown
from src.common.strict_json import read_json
from src.common.tree import listed
from src.data.examples import Example
from src.data.ledger import BadRow
from src.data.lines import LINE_BYTES, parse_example
from src.data.moments import Moments, moments_of_manifest

MANIFEST = "manifest.json"
FORMAT = 1
OPEN = 256  # shards at a time
OPTIONS = "group_size:1"  # a record has its own checksum: damage spoils no other


class Shards:
    """The rows of a folder of shards by number; `classes` are those of the manifest, if any, and `moments` what it says
    of them, where the shards hold those of latents instead of pictures (`tools.latents`).

    Raises FileNotFoundError without a manifest, ValueError for another kind of examples, or naming every shard that is
    missing or damaged.
    """

    def __init__(self, folder: epath.Path, kind: str = "captions"):
        self.folder, self.kind = folder, kind
        shards, schema = _manifest(folder)
        if schema["kind"] != kind:
            raise ValueError(
                f"{os.fspath(folder)!r} holds {shown(schema['kind'])}, this task reads {kind}: give shards of {kind}"
            )
        self.classes: list[dict[str, str]] = schema["classes"]
        self.moments: Moments | None = schema["moments"]
        self.names = [shard["name"] for shard in shards]
        self._starts = np.cumsum([0, *(shard["rows"] for shard in shards)])
        self._readers = Readers()
        wrong = [f"{shard['name']} {reason}" for shard in shards if (reason := self._flaw(**shard))]
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(shards)} shards of {os.fspath(folder)!r} cannot be used: {listed(wrong)};"
                " copy them again from their source, or write them anew"
            )

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, index: int) -> Example:
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        record = index - int(self._starts[shard])
        where = f"{self.names[shard]} record {record}"
        data = self._readers.read(self.folder / self.names[shard], record, where)
        end = 4 + int.from_bytes(data[:4], "little")
        if end > min(len(data), LINE_BYTES):
            raise BadRow("the record is cut off", where, f"{len(data)} of {end} bytes")
        image = data[end:] if data[end:] or self.kind != "chats" else None
        return Example(where, parse_example(data[4:end], where), image)

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
        reader = open_shard(path)
        try:
            return "" if reader.ok() and reader.num_records() == rows else "has a damaged index"
        finally:
            close_shard(reader)


def _manifest(folder: epath.Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Name, rows and bytes of the shards, and the kind of examples with its classes."""
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
        schema = told.get("schema", {})
        classes = [{"id": str(c["id"]), "name": str(c["name"])} for c in schema.get("classes", ())]
        moments = moments_of_manifest(schema.get("image"))
        return shards, {"kind": schema.get("kind", "captions"), "classes": classes, "moments": moments}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no manifest of shards ({error}): write the shards anew") from error


def pack(told: dict[str, Any], image: bytes = b"") -> bytes:
    """A record."""
    header = json.dumps(told).encode()
    return len(header).to_bytes(4, "little") + header + image


def write_shard(path: str | os.PathLike[str], records: Iterable[bytes]) -> dict[str, Any]:
    """Writes one local shard and returns its rows, bytes and SHA-256; equal records give equal bytes."""
    from array_record.python.array_record_module import ArrayRecordWriter

    writer, rows = ArrayRecordWriter(os.fspath(path), OPTIONS), 0
    for record in records:
        writer.write(record)
        rows += 1
    writer.close()
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return {"rows": rows, "bytes": os.path.getsize(path), "sha256": digest.hexdigest()}


def write_manifest(folder: epath.Path, shards: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Writes the manifest of shards that are there, and returns it; it comes last, so that half a folder is refused."""
    manifest = {"format": FORMAT, "rows": sum(shard["rows"] for shard in shards)} | more | {"shards": shards}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest


def write_shards(
    folder: str | os.PathLike[str], examples: Iterable[tuple[str, bytes]], rows: int = 1000
) -> dict[str, Any]:
    """Writes (caption, bytes of an image file) examples into shards of `rows` rows, and returns the manifest.

    Raises FileExistsError where there is one already.
    """
    target = epath.Path(folder)
    if (target / MANIFEST).exists():
        raise FileExistsError(f"{os.fspath(target)!r} has shards already: give another folder")
    target.mkdir(parents=True, exist_ok=True)
    shards, stream = [], iter(examples)
    for number in itertools.count():
        part = [pack({"caption": caption}, image) for caption, image in itertools.islice(stream, rows)]
        if not part:
            break
        name = f"{number:05d}.arrayrecord"
        shards.append({"name": name} | write_shard(target / name, part))
    return write_manifest(target, shards, schema={"kind": "captions"})


class Readers:
    """Open shards, shared by threads: the last `OPEN` that were read."""

    def __init__(self) -> None:
        self._open: dict[epath.Path, Any] = {}
        self._lock = threading.Lock()

    def read(self, path: epath.Path, record: int, where: str) -> bytes:
        """One record of a shard. Raises BadRow."""
        with self._lock:
            try:
                reader = self._open.pop(path, None) or open_shard(local_copy(path))
                self._open[path] = reader  # the last one
                if len(self._open) > OPEN:
                    close_shard(self._open.pop(next(iter(self._open))))
                return reader.read([record])[0]
            except RuntimeError as error:
                raise BadRow("the record is damaged", where, error) from error


def open_shard(path: Any) -> Any:
    """A reader of a local shard; an error at opening is told by `read`."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(os.fspath(path))


def close_shard(reader: Any) -> None:
    """Closes a reader, also one of a damaged file."""
    try:
        reader.close()
    except RuntimeError:  # it tells of the damage again
        return
