"""The files of a tokenizer beside weights."""

from __future__ import annotations

import os

from etils import epath

from src.common.files import write_whole
from src.common.inside import read_bounded

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
