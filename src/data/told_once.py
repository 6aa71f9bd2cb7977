"""Warnings about what rows lose: of each kind one in a process, with the first place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from src.common.files.paths import shown

KINDS = 32  # of loss, that a process tells of: keys of a hostile file have no end
_told: set[str] = set()


def tell_once(what: str, where: str) -> None:
    """A warning about a kind of loss, where it is first met in this process."""
    if what not in _told and len(_told) < KINDS:
        _told.add(what)
        logging.warning("%s: %s (told once)", where, what)


def tell_keys(told: Mapping[str, Any], where: str, read: Collection[str], which: str) -> None:
    """`tell_once` for the keys of an object, but for those of `read`, that may hold more of a row: several words, a
    list or an object. `which` says where they stand, such as "of a turn"."""
    for key, value in told.items():
        full = " " in value.strip() if isinstance(value, str) else isinstance(value, list | dict) and value
        if full and key not in read:
            tell_once(f"the key {shown(key)} {which} is not read", where)


def tell_cut(what: str, room: int, where: str) -> None:
    """`tell_once` for a text or chat of which only the first `room` tokens are used."""
    tell_once(
        f"the {what} is cut to {room} tokens: give a larger length, or too_long='skip' to refuse such rows", where
    )
