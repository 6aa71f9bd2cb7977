"""The files of a tokenizer beside weights."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from src.codecs.text import SPECIALS
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
ENTRY = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
# What a file begins as that is not there; `legacy`: the first word after a special token has its word start.
NEW = {"tokenizer_config.json": {"tokenizer_class": "LlamaTokenizer", "legacy": True}}
ROLES = ("bos_token", "eos_token", "unk_token")
RESERVED = "<|reserved_{}|>"  # the name of a row that no file names


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


def json_pieces(folder: str | os.PathLike[str]) -> int | None:
    """Tokens of the tokenizer.json in a folder, without the special tokens that were put behind them here and the
    placeholders before these; None where there is none, or no vocabulary in it."""
    path = epath.Path(folder) / "tokenizer.json"
    told = _read(path) if path.exists() else {}
    words = told["model"].get("vocab") if isinstance(told.get("model"), dict) else None
    if not isinstance(words, dict | list) or not words:
        return None
    last = max(word for word in (words.values() if isinstance(words, dict) else [len(words) - 1]) if type(word) is int)
    added = sorted(words_by_id(folder).items())
    if [word for _, word in added[-len(SPECIALS) :]] == list(SPECIALS):
        del added[-len(SPECIALS) :]
        while added and added[-1][1] == RESERVED.format(added[-1][0]):
            added.pop()
    return max([last, *(number for number, _ in added[-1:])]) + 1


def words_by_id(folder: str | os.PathLike[str]) -> dict[int, str]:
    """The words that a folder's files name by their id, beside the pieces of its model.

    Raises ValueError, in one sentence, for files of another form, and where two of them differ.
    """
    found: dict[int, str] = {}
    for name, words_in in READERS.items():
        path = epath.Path(folder) / name
        if not path.exists():
            continue
        told = _read(path)
        try:
            words = {int(number): str(word) for word, number in words_in(told)}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{os.fspath(path)!r} is no file of a tokenizer: fetch it anew") from error
        differ = {number: (found[number], word) for number, word in words.items() if found.get(number, word) != word}
        if differ:
            raise ValueError(f"{os.fspath(path)!r} names other words than the files beside it ({differ}): correct one")
        found |= words
    return found


def chat_templates(folder: str | os.PathLike[str]) -> list[str]:
    """The files of a folder that hold a template of chats."""
    path = epath.Path(folder) / "tokenizer_config.json"
    inside = path.exists() and bool(_read(path).get("chat_template"))
    alone = [name for name in ("chat_template.jinja", "chat_template.json") if (path.parent / name).exists()]
    return [path.name] * inside + alone


def loose_words(folder: str | os.PathLike[str]) -> list[str]:
    """Words of `special_tokens_map.json` that have no id there, beside those that stand for one (`<s>`, `</s>`)."""
    path = epath.Path(folder) / "special_tokens_map.json"
    more = _read(path).get("additional_special_tokens") if path.exists() else None
    return [word.get("content", "") if isinstance(word, dict) else str(word) for word in more or ()]


def name_special_tokens(folder: str | os.PathLike[str], first: int, pieces: int | None) -> list[str]:
    """Tells a folder's tokenizer files of the special tokens, as transformers' readers look for them, and makes `<PAD>`
    the token of padding; gives back the words that had one of their names.

    first    the id of the first special token; pieces: of the tokenizer's own model

    Ids below them that no file names get a placeholder, because the tokenizers library numbers added words without
    gaps; where such a word is `eos_token` or the like, it is so under its new name. Raises ValueError for a file that
    is no JSON object.
    """
    own = {first + place: word for place, word in enumerate(SPECIALS)}
    taken = words_by_id(folder)
    moved = {number: word for number, word in taken.items() if word in SPECIALS and own.get(number) != word}
    words = {
        number: taken.get(number, RESERVED.format(number))
        for number in range(first if pieces is None else pieces, first)
    }
    words |= {number: RESERVED.format(number) for number in moved} | own
    for name, add in (("tokenizer.json", _list), ("tokenizer_config.json", _decode), ("added_tokens.json", _name)):
        path = epath.Path(folder) / name
        if not path.exists() and name == "tokenizer.json":
            continue
        told = _read(path) if path.exists() else dict(NEW.get(name, {}))
        for number in sorted(words):
            add(told, words[number], number)
        _rename(told, moved)
        told |= {"pad_token": SPECIALS[0]} if name == "tokenizer_config.json" else {}
        write_whole(path, json.dumps(told, ensure_ascii=False, indent=2).encode())
    path = epath.Path(folder) / "special_tokens_map.json"
    if path.exists():
        told = _read(path)
        _rename(told, moved)
        write_whole(path, json.dumps(told | {"pad_token": SPECIALS[0]}, ensure_ascii=False, indent=2).encode())
    return [f"{word} ({number})" for number, word in sorted(moved.items())]


def _rename(told: dict[str, Any], moved: Mapping[int, str]) -> None:
    """Gives the words of `bos_token` and the like their new names."""
    new = {word: RESERVED.format(number) for number, word in moved.items()}
    for role in ROLES:
        word = told.get(role)
        if isinstance(word, dict) and word.get("content") in new:
            told[role] = word | {"content": new[word["content"]]}
        elif isinstance(word, str) and word in new:
            told[role] = new[word]


def _read(path: epath.Path) -> dict[str, Any]:
    told = read_json(path, limit=LIMIT, finite=False, what="tokenizer's file")
    if not isinstance(told, dict):
        raise ValueError(f"{os.fspath(path)!r} is no JSON object: give the tokenizer's files as published")
    return told


# Of each file: its words and their ids, and how one is put there.


def _listed(told: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((token["content"], token["id"]) for token in told.get("added_tokens") or ())


def _list(told: dict[str, Any], word: str, number: int) -> None:
    tokens = told.setdefault("added_tokens", [])
    same = next((token for token in tokens if token["id"] == number), None)
    if same is None:
        tokens.append({"id": number, "content": word} | ENTRY)
        tokens.sort(key=lambda token: token["id"])
    else:
        same["content"] = word


def _decoded(told: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return ((entry["content"], number) for number, entry in (told.get("added_tokens_decoder") or {}).items())


def _decode(told: dict[str, Any], word: str, number: int) -> None:
    told.setdefault("added_tokens_decoder", {}).setdefault(str(number), dict(ENTRY))["content"] = word


def _named(told: dict[str, Any]) -> Iterator[tuple[Any, Any]]:
    return iter(told.items())


def _name(told: dict[str, Any], word: str, number: int) -> None:
    for other in [other for other, its in told.items() if its == number]:
        del told[other]
    told[word] = number


READERS = {"added_tokens.json": _named, "tokenizer_config.json": _decoded, "tokenizer.json": _listed}
