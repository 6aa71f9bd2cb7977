"""Warnings about what rows lose: of each kind one in a process, with the first place."""

from __future__ import annotations

from absl import logging

KINDS = 32  # of loss, that a process tells of: keys of a hostile file have no end
_told: set[str] = set()


def tell_once(what: str, where: str) -> None:
    """A warning about a kind of loss, where it is first met in this process."""
    if what not in _told and len(_told) < KINDS:
        _told.add(what)
        logging.warning("%s: %s (told once)", where, what)


def tell_cut(what: str, room: int, where: str) -> None:
    """`tell_once` for a text or chat of which only the first `room` tokens are used."""
    tell_once(
        f"the {what} is cut to {room} tokens: give a larger length, or too_long='skip' to refuse such rows", where
    )
