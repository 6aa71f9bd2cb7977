"""Examples: what a source gives for a number, raw values by name; and `BadRow`, what it raises for a row without use.

A source has `__len__` and `__getitem__(number) -> Example` (a plain dict does, too). It is a function of the number,
is shared by threads, and is pickled to worker processes. Everything else is optional:

    draws, drawn   number of uniform numbers in [0, 1), and `drawn(number, uniforms) -> Example`: a training row with
                   random changes
    held_out       how many rows are the split "test": the last ones, or, with `spread`, some all over the source
    goes_on        `goes_on(number) -> bool`: the row and the one before are parts of one thing, and share a split
    holds          what images are, `pixels` (files, or uint8 arrays), `values` (float arrays, as the device gets them)
                   or `moments` of latents; `pixels` by default
    classes        [{"id": "n01440764", "name": "tench"}, …]
    every          `every(name) -> texts`: all that the source may say under a name, for a length that fits
    texts          `texts() -> texts`: what a tokenizer is trained on
    image_shape    of every image, for sources of arrays; refused at once where the field takes another
    asked, right   `asked(split)`, questions with a `prompt`, and `right(prompt, answer) -> bool`, which judges answers
    judged         `judged(question, made) -> {name: number}` judges what was made for an example of its own;
                   `features(question, made)` -> those of it and of a real value that fits, [n, d] each
    identity       `identity() -> texts` that change when the data do: what is learned about them is kept under it
    kind, moments, cut   of shards, see `files/shards.py`

Names of values, by what reads them (`templates/`):

    image            a path, the bytes of a file, an array [h, w, C], or the bytes of moments
    caption, prompt, text, …   a text, or several that mean the same
    label            a class
    turns            texts of user and assistant in turn; the marker `<image>` is where the image stands
    parts            of a document: {"text": "…", "loss": true} or {"image": …, "role": "generate"}
    before           of a piece of a chat: how many turns of the chat are in earlier rows
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import numpy as np

from src.common.files.paths import shown

Row = dict[str, np.ndarray]  # the arrays of a row, by name
MARKER = "<image>"
FLAW_BYTES = 384  # of what a worker may tell about a row


class Example(dict):
    """Raw values by name; `where` names the row in reports."""

    def __init__(self, values: Mapping[str, Any], where: str = ""):
        super().__init__(values)
        self.where = where


@runtime_checkable
class Source(Protocol):
    """What a source must have; see the head of this module for what it may have."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int) -> Mapping[str, Any]: ...


class BadRow(Exception):
    """Raised for a row that cannot be used.

    reason    a few words, the same for all rows that fail alike: they are counted by it
    where     the file and the line or record
    detail    what exactly was found there
    rest      the arrays of what can be used of the row all the same (some examples of a packed row); None: nothing
    """

    def __init__(
        self, reason: str, where: object = "", detail: object = "", rest: Mapping[str, np.ndarray] | None = None
    ):
        self.reason, self.where, self.detail = (" ".join(str(part).split()) for part in (reason, where, detail))
        told = f"{self.where}: {self.reason}" if self.where else self.reason
        super().__init__(f"{told} ({self.detail})" if self.detail else told)
        self.rest = rest

    def pack(self) -> np.ndarray:
        """As uint8 `[FLAW_BYTES]`, which travels with the batch; what is too long is cut."""
        text = f"{self.reason[:80]}\n{self.where[-100:]}\n{self.detail}"
        return np.frombuffer(text.encode(errors="replace")[:FLAW_BYTES].ljust(FLAW_BYTES, b"\0"), np.uint8)

    @classmethod
    def unpack(cls, data: np.ndarray) -> BadRow:
        """What `pack` gave."""
        return cls(*data.tobytes().rstrip(b"\0").decode(errors="ignore").split("\n", 2))


SOUND = np.zeros(FLAW_BYTES, np.uint8)  # instead of a packed flaw


def as_example(value: Mapping[str, Any], where: str) -> Example:
    """Raw values as an example, called `where` if they have no name for reports."""
    return value if isinstance(value, Example) and value.where else Example(value, where)


def texts_of(example: Example, name: str = "caption") -> list[str]:
    """The texts under a name, none of them empty. Raises BadRow."""
    value = example.get(name)
    texts = list(value) if isinstance(value, list | tuple) else [value]
    if not texts or not all(isinstance(text, str) for text in texts):
        found = "" if value is None else f"it is {shown(value, 40)}, no text"
        raise BadRow(f"there is no {name}", example.where, found)
    if not all(text.strip() for text in texts):
        raise BadRow(f"the {name} is empty", example.where)
    return texts


def turns_of(example: Example) -> list[str]:
    """The turns of a chat: texts that are not empty, user and assistant, at least one of each. Raises BadRow."""
    turns, where = example.get("turns"), example.where
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        told = enumerate(turns, 1) if isinstance(turns, list) else ()
        found = next((f"turn {n} is {shown(turn, 40)}" for n, turn in told if not isinstance(turn, str)), "")
        raise BadRow("the turns are no list of texts", where, found)
    if len(turns) < 2 or len(turns) % 2:
        raise BadRow("the turns are not question and answer", where, f"{len(turns)} turns")
    empty = [place for place, turn in enumerate(turns) if not turn.strip()]
    if empty:
        raise BadRow("a turn is empty", where, f"turn {empty[0] + 1} of {len(turns)}")
    return turns


def label_of(example: Example, classes: int | None) -> int:
    """The class of an example, of so many; None: of any number. Raises BadRow."""
    label = example.get("label")
    if isinstance(label, np.integer):
        label = int(label)
    if type(label) is not int or not 0 <= label < (2**31 if classes is None else classes):
        raise BadRow("the label is no class", example.where, f"{label} of {classes} classes")
    return label
