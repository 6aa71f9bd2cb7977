"""The tokens that begin and end a text: those of a tokenizer's model, which a run here has, and those that published
files name for generation."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from etils import epath

from src.codecs.chain import build_chain
from src.codecs.text import Llama, SentencePiece
from src.common.files.store import write_whole
from src.common.files.strict_json import read_json
from src.common.tree import listed
from src.tools.conversion.tokenizer import words_by_id

GENERATION = "generation_config.json"
BYTES = 1 << 20


class Ends(NamedTuple):
    """Ids: of the token that begins a text, and of the one that ends it."""

    bos: int
    eos: int


def ends_of_run(config: Mapping[str, Any]) -> Ends | None:
    """Those of a run's codec; None where it has none, or its file is gone."""
    try:
        codec = build_chain(config["fields"]["text"]["codec"], "fields.text.codec", _learned).host
    except _LearnedError:
        return Ends(1, 2)  # of every model that is learned here
    except (KeyError, ValueError, OSError, ImportError):
        return None
    return Ends(codec.bos, codec.eos) if hasattr(codec, "eos") else None


class _LearnedError(Exception):
    pass


def _learned(what: str, link: Any) -> Any:
    raise _LearnedError


def other_ends(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Lines about a published folder whose texts end otherwise than those of a run with its tokenizer."""
    try:
        codec = SentencePiece(epath.Path(folder) / "tokenizer.model")
    except (OSError, ValueError, ImportError):
        return
    if (codec.bos, codec.eos, codec.unk) != Llama.ids:
        yield (
            f"{folder}: its <s>, </s> and unknown piece are the pieces {codec.bos}, {codec.eos} and {codec.unk}: "
            "read it by text:SentencePiece"
        )
    named = words_by_id(folder)
    for name in (GENERATION, "config.json"):
        if other := [end for end in _ends(folder, name) if end != codec.eos]:
            words = listed([f"{end} ({named[end]})" if end in named else str(end) for end in other])
            yield f"{folder}: {name} ends a text with {words}, and a run here ends it with </s> ({codec.eos})"


def write_ends(folder: str | os.PathLike[str], ends: Ends) -> Iterator[str]:
    """Puts the end of a run's texts before the others of generation_config.json, where that is there, and tells it."""
    path = epath.Path(folder) / GENERATION
    others = [end for end in _ends(folder, GENERATION) if end != ends.eos]
    if not path.exists() or not others:
        return
    told = read_json(path, limit=BYTES, what=GENERATION)
    told |= {"bos_token_id": ends.bos, "eos_token_id": [ends.eos, *others]}
    write_whole(path, json.dumps(told, indent=2).encode())
    yield f"{folder}: {GENERATION} ends a text with {ends.eos}, as the run did, and with {listed(others)}, as before"


def _ends(folder: str | os.PathLike[str], name: str) -> list[int]:
    """The ids of a file's `eos_token_id`, which is one, several or none."""
    path = epath.Path(folder) / name
    told = read_json(path, limit=BYTES, what=name) if path.exists() else {}
    found = told.get("eos_token_id") if isinstance(told, dict) else None
    return [end for end in (found if isinstance(found, list) else [found]) if type(end) is int]
