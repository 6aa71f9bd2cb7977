"""The texts of a template: ids in a segment, left aligned, with the padding at its end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from src.data.example import BadRow, Row
from src.data.told_once import tell_cut, tell_special
from src.interfaces import Field, Tokens
from src.sequence.segment import Segment

CHARACTERS = 32  # of a text that are looked at for each token that it may have
ENDLESS = 2**16  # characters: no caption of an image, whatever `too_long` says
MASK = "<mask>"  # a token of a text that is to be filled in
LONGEST = 2**20  # tokens of a text of a row: each row has arrays of that length
Parts = Sequence[tuple[Sequence[int], bool]]  # (ids, are they targets?)


def text_codec(fields: Mapping[str, Field], name: str, option: str = "text") -> Any:
    """The text codec of a field. Raises ValueError where there is no such field, or none of text."""
    codec = field_of(fields, name, option).codec.host
    if not hasattr(codec, "bos"):
        raise ValueError(f"{option}={name!r} is a field without text: its first codec is {type(codec).__name__}")
    return codec


def field_of(fields: Mapping[str, Field], name: str, option: str) -> Field:
    """A row of the table. Raises ValueError where there is none of that name."""
    if name not in fields:
        raise ValueError(
            f"{option}={name!r} names no field; config.fields has {', '.join(fields) or 'none'}: add it there"
        )
    return fields[name]


class Words:
    """One text segment of fixed length; `options` are those of `Segment`.

    Raises ValueError for what cannot be such a segment.
    """

    def __init__(self, name: str, codec: Any, length: int, **options: Any):
        check_lengths(**{name: length})
        self.name, self.codec, self.length = name, codec, length
        self.segment = Segment((name,), length, **options)

    def check(self, source: Any) -> None:
        """Nothing."""

    def filled(self, parts: Parts) -> list[tuple[Sequence[int], bool]]:
        """Some parts with further </s> up to the end of their last noisy block, all of them targets."""
        used = sum(len(ids) for ids, _ in parts)
        ends = np.cumsum(self.segment.sizes(noisy=True))
        left = next((int(end) - used for end in ends if end >= used), 0)
        return [*parts, ([self.codec.eos] * left, True)]

    def row(self, parts: Parts, *, prompt: bool = False, make: bool = False) -> Row:
        """The arrays of a text that is given as parts; nothing of a `prompt` is a target, but what is to be made
        behind it, up to the end of the segment (`make`). What is too long is cut."""
        given = [i for part, _ in parts for i in part][: self.length]
        target = np.full(self.length, make)
        target[: len(given)] = [wanted and not prompt for part, wanted in parts for _ in part][: self.length]
        ids = np.full(self.length, 0 if make else self.codec.pad, np.int32)
        ids[: len(given)] = given
        valid = np.arange(self.length) < (self.length if make else len(given))
        return {f"{self.name}/ids": ids, f"{self.name}/valid": valid, f"{self.name}/target": target}

    def blank(self) -> Row:
        """The arrays of a row that was refused."""
        flags = {f"{self.name}/{kind}": np.zeros(self.length, bool) for kind in ("valid", "target")}
        return {f"{self.name}/ids": np.zeros(self.length, np.int32)} | flags

    def tokens(self, rows: Mapping[str, np.ndarray]) -> Tokens:
        """The tokens of stacked rows."""
        return Tokens(*(rows[f"{self.name}/{kind}"] for kind in ("ids", "valid", "target")))

    def invent(self, rng: np.random.Generator, number: int, target: bool) -> Row:
        """A random text of at least one token."""
        ids = rng.integers(0, self.codec.vocab_size, rng.integers(1, self.length + 1))
        return self.row([(ids.tolist(), target)])


def encode(
    codec: Any, text: str, room: int, where: str, *, skip: bool = False, limit: int | None = None
) -> tuple[list[int], bool]:
    """At most `room` ids of a text, and whether these are all.

    Raises BadRow for a text that cannot be encoded, for one of more characters than `limit`, and, with `skip`, for a
    longer one.
    """
    most = CHARACTERS * (room + 2)
    if limit is not None and len(text) > limit:
        raise BadRow(f"the text is longer than {limit:,} characters", where, f"{len(text):,} characters")
    tell_special(text[:most], where)
    try:
        ids = list(codec.encode(text[:most])) if text else []  # a long text is cut before it costs anything
    except ValueError as error:
        raise BadRow("the text cannot be encoded", where, error) from error
    whole = len(ids) <= room and len(text) <= most
    if not whole and skip:
        raise BadRow("the text is too long", where, f"{len(text):,} characters, and there is room for {room} tokens")
    if not whole:
        tell_cut("text", room, where)
    return ids[:room], whole


def encode_masked(codec: Any, text: str, room: int, where: str) -> list[tuple[list[int], bool]]:
    """The parts of a text with `<mask>` in place of each unknown token, which are the targets.

    Raises BadRow for a text that cannot be encoded, or is too long.
    """
    parts: list[tuple[list[int], bool]] = []
    for number, given in enumerate(text.split(MASK)):
        parts += [([0], True)] * (number > 0)
        parts.append((encode(codec, given.strip(), room, where, skip=True)[0], False))
    if (count := sum(len(ids) for ids, _ in parts)) > room:
        raise BadRow("the text is too long", where, f"{count} tokens, and there is room for {room}")
    return parts


def check_lengths(**lengths: int) -> None:
    """Raises ValueError, in one sentence, for one of more than `LONGEST` tokens."""
    for name, length in lengths.items():
        if isinstance(length, int) and length > LONGEST:
            raise ValueError(f"{name} of {length:,} tokens is not possible: give a length of {LONGEST:,} at most")


def check_too_long(value: str) -> None:
    """Raises ValueError for an unknown choice of what happens to long texts."""
    if value not in ("cut", "skip"):
        raise ValueError(f"too_long={value!r} is unknown: use cut or skip")


def room_for(
    source: Any,
    name: str,
    frame: Callable[[str], int],
    length: int | None,
    row_length: int | None,
    fixed: int,
) -> int:
    """Tokens of the one text segment of a template whose length is free.

    length       what the config says, or None: that of the longest text `name` of the source (`every`)
    row_length   instead, the length of the whole row, of which `fixed` tokens are something else
    frame        text -> tokens that it takes

    Raises ValueError where a text does not fit, and where nobody says the length.
    """
    if row_length is not None:
        if length is not None:
            raise ValueError(f"length={length} and row_length={row_length} say the same twice: give one of them")
        length = row_length - fixed
    every: Iterable[str] | None = source.every(name) if hasattr(source, "every") else None
    if every is None:
        if length is None or length < 3:
            raise ValueError(f"length={length} is not possible: give the tokens of the text, at least 3")
        return length
    longest = max(frame(text) for text in every)
    if length is not None and length < longest:
        said = f"length={length}" if row_length is None else f"row_length={row_length}"
        raise ValueError(f"{said} is too short: the longest {name} takes {longest} tokens beside {fixed} others")
    return longest if length is None else length
