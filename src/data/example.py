"""Examples in files by number: what a source of files is.

A source has a `kind`, a length, and gives the example of a number or raises `BadRow`. It is a function of its files and
the number, is shared by threads, and is opened by each worker process on its own.

    kind       what `Example.told` says of the picture
    captions   texts by name, "caption" or others
    classes    "label", an index into the source's `classes`, [{"id": "n01440764", "name": "tench"}]
    chats      "turns", texts of user and assistant in turn; the marker `<image>` is where the picture stands, if any
    documents  "parts", texts and images (`spans.document`); the images are those of the parts, in order
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from etils import epath

from src.data.pipeline.bad_rows import BadRow

MARKER = "<image>"


class Example(NamedTuple):
    """What is `told`, and the pictures, paths or the bytes of files; `where` names the row in reports."""

    where: str
    told: dict[str, Any]
    images: tuple[epath.Path | bytes, ...] = ()

    @property
    def image(self) -> epath.Path | bytes | None:
        """The one picture of all kinds but documents, if it is there."""
        return self.images[0] if self.images else None


class Examples(Protocol):
    """A source of files."""

    kind: str

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...


def caption_of(told: dict[str, Any], where: str, name: str = "caption") -> str:
    """The text `name` of an example, not empty. Raises BadRow."""
    caption = told.get(name)
    if not isinstance(caption, str):
        raise BadRow(f"there is no {name}", where)
    if not caption.strip():
        raise BadRow(f"the {name} is empty", where)
    return caption


def turns_of(told: dict[str, Any], where: str) -> list[str]:
    """The turns of a chat: texts that are not empty, user and assistant, at least one of each. Raises BadRow."""
    turns = told.get("turns")
    if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
        raise BadRow("the turns are no list of texts", where)
    if len(turns) < 2 or len(turns) % 2:
        raise BadRow("the turns are not question and answer", where, f"{len(turns)} turns")
    empty = [place for place, turn in enumerate(turns) if not turn.strip()]
    if empty:
        raise BadRow("a turn is empty", where, f"turn {empty[0] + 1} of {len(turns)}")
    return turns


def label_of(told: dict[str, Any], where: str, classes: int) -> int:
    """The class of an example. Raises BadRow."""
    label = told.get("label")
    if type(label) is not int or not 0 <= label < classes:
        raise BadRow("the label is no class", where, f"{label} of {classes} classes")
    return label
