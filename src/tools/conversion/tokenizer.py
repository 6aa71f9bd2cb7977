"""The files of a tokenizer beside weights."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from src.common.files.paths import read_bounded
from src.common.files.store import write_whole
from src.common.files.strict_json import read_json

NAMES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
)
LIMIT = 64 << 20


def copy_tokenizer(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Copies what a folder has of them (and of generation_config.json); returns the names.

    Raises ValueError for a file of more than 64 MB, OSError, or what the store's client raises.
    """
    copied = []
    for name in NAMES:
        if (epath.Path(source) / name).exists():
            write_whole(epath.Path(target) / name, read_bounded(epath.Path(source) / name, LIMIT))
            copied.append(name)
    return copied


def add_words(folder: str | os.PathLike[str], words: Mapping[str, int]) -> None:
    """Tells a folder's tokenizer files of special tokens by id, as transformers' readers look for them; those that are
    there already stay.

    Raises ValueError for a file that is no JSON object.
    """
    entry = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for name, add in (("tokenizer.json", _listed), ("tokenizer_config.json", _decoded), ("added_tokens.json", _named)):
        path = epath.Path(folder) / name
        if path.exists():
            told = read_json(path, limit=LIMIT, finite=False, what="tokenizer's file")
            if not isinstance(told, dict):
                raise ValueError(f"{os.fspath(path)!r} is no JSON object: give the tokenizer's files as published")
        elif name == "added_tokens.json":
            told = {}
        else:
            continue
        for word, number in words.items():
            add(told, word, number, entry)
        write_whole(path, json.dumps(told, ensure_ascii=False, indent=2).encode())


def _listed(told: dict[str, Any], word: str, number: int, entry: dict[str, bool]) -> None:
    tokens = told.setdefault("added_tokens", [])
    if all(token.get("content") != word for token in tokens):
        tokens.append({"id": number, "content": word} | entry)


def _decoded(told: dict[str, Any], word: str, number: int, entry: dict[str, bool]) -> None:
    told.setdefault("added_tokens_decoder", {}).setdefault(str(number), {"content": word} | entry)


def _named(told: dict[str, Any], word: str, number: int, entry: dict[str, bool]) -> None:
    told.setdefault(word, number)
