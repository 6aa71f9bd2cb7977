"""What a file or folder of data is: the source that reads it, and the lines of a config that do."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

from etils import epath

from src.common.files.images import ENDINGS
from src.common.lookup import build
from src.data.example import BadRow
from src.data.files.columns import ENDINGS as COLUMNS
from src.data.files.columns import ColumnFile
from src.data.files.compressed import is_compressed
from src.data.files.folder_walk import files_below
from src.data.files.json_list import open_rows
from src.data.files.left_out import LeftOut
from src.data.files.shards import MANIFEST
from src.data.record import classes_of, kind_of, record_of
from src.data.sources._chats import LISTS, TOOLS, WHO
from src.data.sources._tool_turns import CALLS, TOOL
from src.data.sources.captions import LINES, TABLES
from src.data.splits import example_of

CHATS = ("messages", "conversations", "conversation", "instruction", "data")  # keys and columns of a chat
CAPTIONS = ("caption", "text", "prompt", "captions", "description")
LABELS = ("label", "labels", "class", "fine_label")
TEXTS = ("text", "content")
FIRST = 8  # rows that are looked at to learn what they are
LOOKED = 4096  # files of a folder that are looked at
LINE_ENDINGS = (".jsonl", ".json")


class Found(NamedTuple):
    """What data are.

    what     in words
    source   the options of the source that reads them
    rows     their number, bad ones included
    kind     of examples, see `data/files/shards.py`
    classes  id and name of each
    labels   the largest one that was read, and one; 0 of data without classes
    seen     rows that were read
    bad      the bad ones among them
    """

    what: str
    source: dict[str, Any]
    rows: int
    kind: str
    classes: list[dict[str, str]]
    labels: int
    seen: int
    bad: list[BadRow]


def find(path: str | os.PathLike[str], rows: int) -> Found:
    """What lies at a local or remote path; its first `rows` rows are read, images decoded.

    Raises FileNotFoundError where nothing is there, ValueError for what no source reads, and what the source raises for
    damaged files.
    """
    place = epath.Path(path)
    if not place.exists():
        raise FileNotFoundError(f"{os.fspath(path)!r} does not exist: give a folder or file of data")
    what, options = _told(place)
    source = build("data/sources", options)
    count, bad, labels = len(source), list[BadRow](), 0
    kind = kind_of(source)
    classes = classes_of(source, kind)
    seen = min(count, rows)
    for number in range(seen):
        try:
            example = example_of(source, number)
            record_of(example, kind, len(classes) or None)
            labels = max(labels, int(example.get("label", -1)) + 1)
        except BadRow as flaw:
            bad.append(flaw)
    return Found(what, options, count, kind, classes, labels, seen, bad)


def _told(place: epath.Path) -> tuple[str, dict[str, Any]]:
    """What a path holds, in words, and the source's options. Raises ValueError."""
    if not place.is_dir():
        return _file(place)
    here = {"folder": os.fspath(place)}
    names = {path.name for path in place.iterdir()}
    if MANIFEST in names:
        return "prepared shards", {"name": "records"} | here
    if "documents.jsonl" in names:
        return "documents of texts and images", {"name": "documents"} | here
    if table := next((name for name in (*LINES, *TABLES) if name in names), None):
        return f"images with captions in {table}", {"name": "captions"} | here
    if any(name.lower().endswith(".tar") for name in names):
        return "tar shards", {"name": "webdataset"} | here
    files = sorted(_first_files(place))
    if columns := [path for path in files if path.lower().endswith(COLUMNS)]:
        train = [path for path in columns if "train" in path]
        return _columns(place, (train or columns)[0], "")
    if lines := [name for name in sorted(names) if _is_lines(name)]:
        return _lines(place, lines[0], "")
    images = [path for path in files if path.lower().endswith(ENDINGS)]
    if images and any(path.lower().endswith(".txt") for path in files):
        return "images with captions in text files", {"name": "captions"} | here
    if any("/" in path for path in images):
        return "images by class, a folder for each", {"name": "image_folders"} | here
    told = ", ".join(map(repr, files[:3])) or "no files"
    raise ValueError(
        f"{os.fspath(place)!r} is nothing that a source finds by itself (it has {told}): docs/data.md has what is read"
    )


def _file(place: epath.Path) -> tuple[str, dict[str, Any]]:
    """What a file holds. Raises ValueError."""
    if place.name.lower().endswith(COLUMNS):
        return _columns(place.parent, place.name, place.name)
    if _is_lines(place.name):
        return _lines(place.parent, place.name, place.name)
    raise ValueError(
        f"{os.fspath(place)!r} is no file of rows (.jsonl, .json, these in .gz or .zst, .parquet, .arrow): give such a"
        " file, or the folder that it lies in"
    )


def _first_files(place: epath.Path) -> Iterator[str]:
    for _, path in zip(range(LOOKED), files_below(place, LeftOut()), strict=False):
        if not os.path.basename(path).startswith("."):
            yield path


def _is_lines(name: str) -> bool:
    name = os.path.splitext(name)[0] if is_compressed(name) else name
    return name.lower().endswith(LINE_ENDINGS) and not name.startswith(".")


def _lines(folder: epath.Path, name: str, chosen: str) -> tuple[str, dict[str, Any]]:
    """What lines or a list of JSON hold: chats. Raises ValueError."""
    row = _first_sound(open_rows(folder / name))
    if row and not any(key in row for key in CHATS):
        keys = ", ".join(map(repr, [*row][:6]))
        raise ValueError(
            f"{os.fspath(folder / name)!r} has the keys {keys}, and no chat: docs/data.md lists the forms of chats"
        )
    return _chats(folder, f"{name}: " + ("chats in JSON" if row else "JSON without a sound row"), chosen, row)


def _first_sound(rows: Any) -> dict[str, Any]:
    """One of the first rows that can be read; {} where there is none."""
    for number in range(min(len(rows), FIRST)):
        try:
            return rows[number]
        except BadRow:
            continue
    return {}


def _chats(folder: epath.Path, what: str, names: str, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    turns = next((row[key] for key in LISTS if isinstance(row.get(key), list)), [])
    said = [row, *(turn for turn in turns if isinstance(turn, dict))]
    tools = any(part.get(key) for part in said for key in TOOLS)
    tools = tools or any(part.get(key) in (*TOOL, *CALLS) for part in said[1:] for key in WHO)
    options = {"name": "ultrachat", "folder": os.fspath(folder)} | ({"names": names} if names else {})
    return what, options | ({"tools": "hermes"} if tools else {})


def _columns(folder: epath.Path, path: str, chosen: str) -> tuple[str, dict[str, Any]]:
    """What Parquet or Arrow files hold. Raises ValueError."""
    file = ColumnFile(folder / path)
    types, here = file.types, os.fspath(folder)
    what = f"Parquet or Arrow with the columns {', '.join(types)}"
    if any(key in types for key in CHATS):
        names = chosen or path.replace(os.path.basename(path), "*" + os.path.splitext(path)[1])
        return _chats(folder, what, names, _first_sound(file))
    options = {"name": "parquet", "folder": here} | ({"pattern": chosen} if chosen else {})
    image = next((name for name, kind in types.items() if "bytes" in kind or kind == "binary"), None)
    texts = [name for name, kind in types.items() if kind in ("string", "list<item: string>")]
    caption = next((name for name in CAPTIONS if name in texts), None)
    label = next((name for name in LABELS if "int" in types.get(name, "")), None)
    if image and (caption or label):
        pair = {"caption": caption} if caption else {"label": label}
        return what, options | ({"image": image} if image != "image" else {}) | pair
    if text := next((name for name in TEXTS if name in texts), None):
        return what, options | {"text": text}
    columns = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    raise ValueError(
        f"{os.fspath(folder / path)!r} has the columns {columns}: none is a chat, a text or an image with a caption or"
        " label by its name; name them as docs/data.md says of the source parquet"
    )


def block_of(found: Found) -> str:
    """The lines of a config that read the data: a task, and a field that it needs."""
    head, template, objective = "", {"name": "chat", "length": 2048}, 'common.next_token("text")'
    drawn = "common.diffusion()"
    if found.kind == "captions":
        template, objective = {"name": "caption_to_image", "length": 64}, drawn
    elif found.kind == "classes" and found.classes and all(each["name"] for each in found.classes):
        template, objective = {"name": "class_prompt", "length": 64}, drawn
    elif found.kind == "classes":
        head = f"config.fields.label = common.label({len(found.classes) or found.labels or 1})\n"
        template, objective = {"name": "class_label"}, drawn
    elif found.source.get("text"):
        template, objective = {"name": "text", "length": 1024}, 'common.next_token("text.sentence")'
    elif found.kind == "documents":
        template, objective = {"name": "packed", "length": 2048}, 'common.next_token("text")'
    name = "diffusion" if objective == drawn else "text"
    return (
        f"{head}config.tasks.mine = {{\n"
        '    "weight": 1.0,\n'
        f'    "source": {_python(found.source)},\n'
        f'    "template": {_python(template)},\n'
        f'    "objectives": {{"{name}": {objective}}},\n'
        "}"
    )


def _python(options: dict[str, Any]) -> str:
    return json.dumps(options, ensure_ascii=False)
