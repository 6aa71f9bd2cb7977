"""Untrusted JSON: bounded in bytes and depth, without what JSON forbids and Python accepts."""

from __future__ import annotations

import codecs
import json
import math
import os
from typing import Any

from src.common.files.paths import read_bounded, shown

BYTES = 8 << 20  # what is read takes up to about 25 times its bytes
DEPTH = 64


def read_json(path: str | os.PathLike[str], *, limit: int = BYTES, finite: bool = True, what: str = "file") -> Any:
    """The value of a JSON file (local or in a store).

    Raises FileNotFoundError, OSError when it cannot be read, and ValueError, in one sentence, as `parse_json` does and
    for more than `limit` bytes.
    """
    data = read_bounded(path, limit, what)
    return parse_json(data, f"the {what} {shown(os.fspath(path))}", finite=finite)


def parse_json(data: bytes, where: str, *, depth: int = DEPTH, finite: bool = True) -> Any:
    """The value of UTF-8 encoded JSON, with or without a byte order mark; `where` begins the messages ("the file
    'config.json'").

    Raises ValueError, in one sentence, for text that is not UTF-8 or not JSON, keys given twice, more than `depth`
    levels, integers of thousands of digits, halves of surrogate pairs and, unless `finite` is False, NaN and infinity
    (also as 1e999).
    """
    if is_wide(data):
        raise ValueError(f"{where} is UTF-16 text, not UTF-8: save it as UTF-8")
    try:
        value = json.loads(
            data.removeprefix(codecs.BOM_UTF8).decode(),
            object_pairs_hook=_once,
            parse_constant=_constant if finite else None,
            parse_float=_finite if finite else None,
        )
        _check(value, depth)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 text (byte {error.start}): write it anew") from error
    except RecursionError as error:
        raise ValueError(f"{where} is nested more than {depth} levels deep: write it anew") from error
    except ValueError as error:
        raise ValueError(f"{where} is not sound JSON ({error}): write it anew") from error
    return value


def is_wide(data: bytes) -> bool:
    """Whether a text begins as UTF-16 does: with its byte order mark, or a plain letter of two bytes, one of them 0."""
    return data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or data[:2].count(0) == 1


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        seen: set[str] = set()
        double = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {shown(double)} is there twice")
    return value


def _constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"the number {shown(text)} is too large")
    return value


def _check(value: Any, depth: int) -> None:
    """Raises ValueError for too many levels and for text that cannot be written as UTF-8; does not recurse itself."""
    level = [value]
    for above in range(depth + 1):
        inner: list[Any] = []
        for item in level:
            if isinstance(item, str) and not item.isascii():
                try:
                    item.encode()
                except UnicodeEncodeError as error:
                    near = ascii(item[max(error.start - 20, 0) : error.end + 20])
                    raise ValueError(f"the text {near} has half a surrogate pair") from error
            elif isinstance(item, dict | list):
                if above == depth:
                    raise ValueError(f"it is nested more than {depth} levels deep")
                inner += [*item, *item.values()] if isinstance(item, dict) else item
        level = inner
