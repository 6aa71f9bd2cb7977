"""What templates share: columns of a row, each with a segment, and the way from an example to a batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from src.data.example import BadRow, Example, Row, Source
from src.data.pipeline.reader import stack
from src.data.splits import example_of, numbers_of, rows_of
from src.interfaces import Batch, Field, Layout
from src.sequence.layout import FixedLayout

SEGMENT = ("blocks", "role", "noisy_blocks", "markov")  # options of a segment that a config may give
ORDERS = ("order", "splits")  # and of one of an image, see `data.orders.Orders`
PROBES = 8  # examples that are looked at before a source is refused


class Request(NamedTuple):
    """What an example is made into.

    uniforms   [draws] of a training row; None: of the row `index` of the ordered pass
    prompt     a row to be completed, whose example may lack the names in `fill`; `null`: without its conditions
    """

    uniforms: np.ndarray | None = None
    index: int = 0
    prompt: bool = False
    null: bool = False


class Template:
    """How examples become rows. Subclasses set `fill`, `draws`, `needs` and write `bind` and `row`.

    fill      names that are made, the others are given
    draws     uniform numbers of one row
    needs     values that an example must have; `answers` are those of them that are made
    optional  values that a prompt may have besides
    targets   names of `columns` whose tokens may be targets
    columns   `Words` and `Images`, in the order of their segments; `bind` makes them
    conditional   whether a prompt without its conditions (`null`) is another row
    """

    fill: tuple[str, ...] = ()
    draws: int = 0
    needs: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    conditional: bool = True
    columns: tuple[Any, ...] = ()

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """Makes the columns. Raises ValueError for fields that are not there, and lengths that do not suffice."""
        raise NotImplementedError

    def row(self, example: Example, request: Request) -> Row:
        """The arrays of an example. Raises BadRow."""
        raise NotImplementedError

    @property
    def targets(self) -> frozenset[str]:
        """The names in `fill`, unless a text loss is on others, too."""
        return frozenset(self.fill)

    @property
    def layout(self) -> Layout:
        """Of training rows."""
        return FixedLayout(tuple(column.segment for column in self.columns))

    def rows(self, source: Source, split: str) -> int:
        """Rows of a split. Raises what opening the source raises, and ValueError for one that does not fit."""
        rows = rows_of(source, split)
        self.check(source)
        return rows

    def check(self, source: Source) -> None:
        """Looks at a source before its first row.

        Raises ValueError for shards of something else, and where none of a few examples has what is needed.
        """
        for column in self.columns:
            column.check(source)
        found: dict[str, None] = {}
        for number in range(min(len(source), PROBES)):
            try:
                found |= dict.fromkeys(example_of(source, number))
            except BadRow:
                continue
        if missing := [name for name in self.needs if found and name not in found]:
            raise ValueError(
                f"the template reads {missing[0]!r} and the examples of the source have {', '.join(found)}: choose"
                " another template, or name the value in its options"
            )

    def read(self, source: Source, split: str, index: int, uniforms: np.ndarray | None) -> Row:
        """The arrays of a row of a split. Raises BadRow."""
        own, theirs = (None, None) if uniforms is None else (uniforms[: self.draws], uniforms[self.draws :])
        number = int(numbers_of(source, split, np.asarray(index)))
        return self.row(example_of(source, number, theirs), Request(own, index))

    def prompt(self, examples: Sequence[Example], null: bool) -> tuple[Layout, Batch]:
        """Rows to be completed, and their layout; of several texts that mean the same, each example has another one.
        Raises BadRow and ValueError."""
        rows = [self.row(e, Request(index=number, prompt=True, null=null)) for number, e in enumerate(examples)]
        return self.layout, self.collate(stack(rows))

    def question(self, example: Example) -> Example:
        """The example as a prompt: without what is made."""
        return Example({name: value for name, value in example.items() if name not in self.answers}, example.where)

    def invented_question(self) -> Example:
        """A prompt that needs no data, and no tokenizer: texts are left out."""
        return Example({}, "made up")

    def blank(self) -> Row:
        """The arrays of a row that was refused."""
        row: Row = {}
        for column in self.columns:
            row |= column.blank()
        return row

    def invent(self, rng: np.random.Generator, number: int) -> Row:
        """The arrays of a random row."""
        row: Row = {}
        for column in self.columns:
            row |= column.invent(rng, number, column.name in self.targets)
        return row

    def collate(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """The batch of stacked rows."""
        return Batch({column.name: column.tokens(rows) for column in self.columns})


def segment_options(given: Mapping[str, Any] | None, more: tuple[str, ...] = (), **defaults: Any) -> dict[str, Any]:
    """What a config says of the segment that is made, see `sequence.segment.Segment`. Raises ValueError."""
    given = dict(given or {})
    if unknown := sorted(set(given) - {*SEGMENT, *more}):
        raise ValueError(f"segment has no option {unknown[0]!r}: it has {', '.join((*SEGMENT, *more))}")
    return defaults | given
