"""Warnings about what rows lose: of each kind one in a process, with the first place."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Mapping
from typing import Any

from absl import logging

from src.common.files.images import ENDINGS
from src.common.files.paths import shown

KEYS = 32  # that a process tells of: those of a hostile file have no end
KEY = "the key"
SENTENCE = re.compile(r"\S\s+\S|[.!?…]$")  # words with space between, or an end; an id has neither
SPECIAL = ("<s>", "</s>", "<PAD>", "<|im_start|>", "<|im_end|>")  # as tokens are called that no text becomes
# Words in the name of a split that is no training data: test_sft, val-000, devset, held-out; not contest, valley.
TESTS = re.compile(r"(?<![a-z])(tests?|testing|val|valid|validation|dev|eval|held[ _-]?out)(set)?(?![a-z])")
MARKS = ("weight", "loss", "train")  # of how much a row or an answer counts; 1 is what all count
MEDIA = (*ENDINGS, ".tif", ".tiff", ".heic", ".avif", ".mp4", ".webm", ".mov", ".wav", ".mp3", ".flac", ".pdf")
MARK = re.compile(r"(?<![a-z])(weight|loss|train|mask)")
EMPTY = ("nan", "none", "null", "<na>")  # as programs write a text that is missing
LIST = re.compile(r"""\[\s*(["']).*\1\s*,?\s*\]""", re.DOTALL)  # as pandas writes a list of texts into a table
_told: set[str] = set()


def tell_once(what: str, where: str) -> None:
    """A warning about a kind of loss, where it is first met in this process."""
    if what not in _told:
        _told.add(what)
        logging.warning("%s: %s (told once)", where, what)


def tell_keys(
    told: Mapping[str, Any],
    where: str,
    read: Collection[str],
    which: str,
    marks: Collection[str] = (),
    what: str = "is not read",
) -> None:
    """`tell_once` for the keys of an object, but for those of `read`, that may hold more of a row: a text that is no
    id, a list or an object, the name of a file of images, sound or film; and for the keys `marks`. `which` says where
    they stand, such as "of a turn", and `what` what becomes of them. Behind `KEYS` of them one warning says that there
    are more."""
    for key, value in told.items():
        if key in read or not (key in marks or _says_more(value)):
            continue
        full = f"{KEY} {shown(key)} {which} {what}"
        if full in _told or sum(known.startswith(KEY) for known in _told) < KEYS:
            tell_once(full, where)
        else:
            tell_once(f"further keys {which} are not read, either", where)


def _says_more(value: Any) -> bool:
    """Whether a value may hold more of a row: a list or an object, the name of a file of images, sound or film, or a
    text that is no id. Scripts without capitals (Chinese, Thai, Arabic) have no ids; some of them have no space between
    words."""
    if isinstance(value, str):
        text = value.strip()
        if text.lower().endswith(MEDIA) and "://" not in text:
            return True
        return bool(SENTENCE.search(text)) or any(unicodedata.category(c) == "Lo" for c in text[:64])
    return isinstance(value, list | dict) and bool(value)


def marks_of(told: Mapping[str, Any]) -> list[str]:
    """The keys of a row or turn that say how much it counts: `MARKS` unless they are 1 or none, and numbers and truths
    under longer names (`loss_mask`, `sample_weight`, `train_on_turn`)."""
    plain = [key for key in MARKS if told.get(key) not in (None, 1)]
    longer = (key for key, value in told.items() if isinstance(value, int | float) and key not in MARKS)
    return plain + [key for key in longer if MARK.search(key.lower())]


def is_for_tests(name: str) -> bool:
    """Whether the name of a file, a folder or a split says that it is for tests."""
    return bool(TESTS.search(name.lower()))


def tell_odd(text: str, where: str) -> None:
    """`tell_once` for a text that a program wrote in the place of a list, or of none."""
    if LIST.fullmatch(text.strip()):
        tell_once("a caption in the form of a list is read as one text, with its brackets", where)
    elif text.strip().lower() in EMPTY:
        tell_once(f"the caption {text.strip()!r} is read as a text", where)


def tell_split(told: Mapping[str, Any], where: str) -> None:
    """`tell_once` for a row that says that it is for tests: a source knows them by files and `held_out` alone."""
    for key in ("split", "subset", "partition", "set"):
        value = told.get(key)
        if isinstance(value, str) and is_for_tests(value):
            tell_once(f"a row with {key}={shown(value)} is one like the others: put such rows elsewhere", where)


def tell_special(text: str, where: str) -> None:
    """`tell_once` for a text that spells a special token, as one does that went through a template before."""
    if "<" in text and (found := next((name for name in SPECIAL if name in text), None)):
        tell_once(f"{found} stands in a text and is read as text, not as a special token", where)


def tell_image(example: Mapping[str, Any], where: str) -> None:
    """`tell_once` for a chat about an image in a row that has text alone."""
    if example.get("image") is not None:
        tell_once("the image of a chat is not read here, and its marker is text: see the template picture_chat", where)


def tell_cut(what: str, room: int, where: str) -> None:
    """`tell_once` for a text or chat of which only the first `room` tokens are used."""
    tell_once(
        f"the {what} is cut to {room} tokens: give a larger length, or too_long='skip' to refuse such rows", where
    )
