"""Examples in ArrayRecord shards: few large files with a checksum for each row.

A record is the length of its header (4 bytes, little endian), the header, a JSON object of the example's values
({"caption": "two red pears"}) without its image, and the bytes of the image's file (PNG, JPEG), if there is one; of
several images the header tells the "bytes". `manifest.json` lists the shards with their rows, bytes and SHA-256, so
that a shard that is missing, empty, truncated or damaged where it is indexed is refused by name before the first step,
and says in `schema` what kind of examples they are. A damaged record is a bad row.

    captions   an image and texts            chats       turns, and perhaps an image
    classes    an image and a label          documents   parts, of which any number are images
"""

from __future__ import annotations

import itertools
import json
import os
from typing import Any

import numpy as np
from etils import epath

from src.common.files.paths import inside, shown
from src.common.files.store import write_whole
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.data.example import BadRow, Example
from src.data.files.array_record import ShardFiles
from src.data.files.json_lines import LINE_BYTES, parse_example
from src.data.files.latent_shards import Moments, moments_of_manifest

MANIFEST = "manifest.json"
FORMAT = 1
KINDS = ("captions", "classes", "chats", "documents")
SEVERAL = ("documents",)  # kinds with any number of images
SIZES = "bytes"
HEADER_BYTES = 4 * LINE_BYTES  # a line of a source is longer here, where its letters are written as \u00e9


class Shards:
    """The rows of a folder of shards by number.

    kind      what the examples are
    classes   id and name of each, of shards of classes
    names     of the shards, below the folder
    moments   what the manifest says of moments of latents, where the shards hold these instead of images
    cut       the images are squares of so many pixels

    Raises FileNotFoundError without a manifest, ValueError naming every shard that is missing or damaged.
    """

    def __init__(self, folder: epath.Path):
        self.folder = folder
        shards, schema = _manifest(folder)
        self.kind: str = schema["kind"]
        self.classes: list[dict[str, str]] = schema["classes"]
        self.moments: Moments | None = schema["moments"]
        self.cut: int | None = schema["cut"]
        self.names = [shard["name"] for shard in shards]
        self._digests = [f"{shard['name']} {shard['sha256']}" for shard in shards]
        self._files = ShardFiles(folder, [(shard["name"], shard["rows"]) for shard in shards])
        wrong = {s["name"]: flaw for s in shards if (flaw := self._flaw(s["name"], s["bytes"]))}
        wrong = wrong or dict.fromkeys(self._files.damaged(), "has a damaged index")
        if wrong:
            raise ValueError(
                f"{len(wrong)} of the {len(shards)} shards of {os.fspath(folder)!r} cannot be used:"
                f" {listed([f'{name} {flaw}' for name, flaw in wrong.items()])}; copy them again from their source, or"
                " write them anew"
            )

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, number: int) -> Example:
        data, where = self._files[number]
        end = 4 + int.from_bytes(data[:4], "little")
        if end > min(len(data), HEADER_BYTES):
            raise BadRow("the record is cut off", where, f"{len(data)} of {end} bytes")
        values, rest = parse_example(data[4:end], where), data[end:]
        if self.kind in SEVERAL:
            return Example(_with_images(values, rest, where), where)
        values.pop("image", None)  # a path, from whoever wrote the shard, would be opened
        if rest or self.kind != "chats":
            values["image"] = rest
        return Example(values, where)

    def identity(self) -> list[str]:
        """What changes when the rows do."""
        return self._digests

    def _flaw(self, name: str, bytes: int) -> str:  # the names of the manifest
        """Why a shard is not what the manifest says, or ""."""
        try:
            size = (self.folder / name).stat().length
        except FileNotFoundError:
            return "is missing"
        return f"has {size:,} of {bytes:,} bytes" if size != bytes else ""


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
        shards = [
            {"name": s["name"], "rows": s["rows"], "bytes": s["bytes"], "sha256": str(s.get("sha256"))}
            for s in told["shards"]
        ]
        for shard in shards:
            inside(folder, shard["name"])
            if not all(type(shard[key]) is int and 0 <= shard[key] < 2**50 for key in ("rows", "bytes")):
                raise ValueError(f"{shard} has no sizes")
        schema = told.get("schema", {})
        classes = [{"id": str(c["id"]), "name": str(c["name"])} for c in schema.get("classes", ())]
        image = schema.get("image")
        moments = moments_of_manifest(image)
        cut = image.get("size") if isinstance(image, dict) and not moments else None
        kind = schema.get("kind", "captions")
        if kind not in KINDS:
            raise ValueError(f"it holds {shown(kind)}")
        return shards, {"kind": kind, "classes": classes, "moments": moments, "cut": cut}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{os.fspath(path)!r} is no manifest of shards ({error}): write the shards anew") from error


def _with_images(values: dict[str, Any], data: bytes, where: str) -> dict[str, Any]:
    """The values of a document with its images, one for each of its parts that is an image. Raises BadRow."""
    sizes, parts = values.pop(SIZES, None), values.get("parts")
    sound = isinstance(sizes, list) and all(type(size) is int and size >= 0 for size in sizes)
    if not sound or sum(sizes) != len(data):
        raise BadRow("the images are not as long as the record says", where, f"{len(data)} bytes")
    named = [part for part in parts if isinstance(part, dict) and "image" in part] if isinstance(parts, list) else []
    if len(named) != len(sizes):
        raise BadRow("the record has not the images of its parts", where, f"{len(sizes)} of {len(named)}")
    for part, size, end in zip(named, sizes, itertools.accumulate(sizes), strict=True):
        part["image"] = data[end - size : end]
    return values


def images_of(example: Example, kind: str) -> list[Any]:
    """The images of an example, in order."""
    if kind in SEVERAL:
        return [part["image"] for part in example["parts"] if isinstance(part, dict) and "image" in part]
    return [example["image"]] if example.get("image") is not None else []


def values_of(example: Example, kind: str) -> dict[str, Any]:
    """The values of an example for JSON, without its images."""
    values = {name: value for name, value in example.items() if name != "image"}
    if kind in SEVERAL and isinstance(values.get("parts"), list):
        marked = lambda part: part | {"image": True} if isinstance(part, dict) and "image" in part else part
        values["parts"] = [marked(part) for part in values["parts"]]
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def pack(values: dict[str, Any], *images: bytes, sized: bool = False) -> bytes:
    """A record; that of one of the kinds `SEVERAL` is `sized`."""
    header = json.dumps(values | ({SIZES: [len(image) for image in images]} if sized else {})).encode()
    return len(header).to_bytes(4, "little") + header + b"".join(images)


def write_manifest(folder: epath.Path, shards: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """Writes the manifest of shards that are there, and returns it; it comes last, so that half a folder is refused."""
    manifest = {"format": FORMAT, "rows": sum(shard["rows"] for shard in shards)} | more | {"shards": shards}
    write_whole(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    return manifest
