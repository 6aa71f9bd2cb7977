"""A task is source × template: what the data are, and how they become rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from src.data.example import BadRow, Example, Row, Source, as_example
from src.data.pipeline.reader import stack
from src.data.splits import example_of, numbers_of, rows_of
from src.data.templates._base import Template
from src.interfaces import Batch, Field, Layout


class SourceTask:
    """Rows that `template` makes of the examples of `source`; see `interfaces.Task` and `pipeline.reader.Rows`.

    The uniform numbers of a row are those of the template, then those of the source. The template is bound to `fields`
    here and belongs to this task from then on.

    Raises ValueError, naming `tasks.<name>`, for options that do not go together and fields that are not there.
    """

    def __init__(self, name: str, source: Source, template: Template, fields: Mapping[str, Field]):
        self.name, self.source, self.template = name, source, template
        try:
            template.bind(fields, source)
        except ValueError as error:
            raise ValueError(f"tasks.{name}.template: {error}") from error
        self.draws = template.draws + getattr(source, "draws", 0)
        self.fill: tuple[str, ...] = template.fill
        self.conditional: bool = template.conditional
        self.layout: Layout = template.layout

    @property
    def latents_of(self) -> str | None:
        """The hash of the codec whose moments of latents the files hold, None where they do not say it. Opens them."""
        if getattr(self.source, "holds", "pixels") != "moments":
            return None
        moments = getattr(self.source, "moments", None)
        return moments and moments.codec

    @property
    def buckets(self) -> Any:
        """The buckets of aspect ratios of the template's images, or None."""
        found = [getattr(column, "buckets", None) for column in self.template.columns]
        return next((buckets for buckets in found if buckets), None)

    def rows(self, split: str) -> int:
        """Rows of a split, bad ones included.

        Raises FileNotFoundError if files are missing, ValueError if they do not fit the task or the split is empty.
        """
        try:
            return self.template.rows(self.source, split)
        except ValueError as error:
            raise ValueError(f"tasks.{self.name}: {error}") from error

    def read(self, split: str, index: int, uniforms: np.ndarray | None = None) -> Row:
        """Arrays of a row. Raises BadRow."""
        return self.template.read(self.source, split, index, uniforms)

    def blank(self) -> Row:
        """Arrays of the same shapes for a row that was refused."""
        return self.template.blank()

    def build(self, rows: Mapping[str, np.ndarray]) -> Batch:
        """The batch of rows that `read` gave, stacked."""
        return self.template.collate(rows)

    def element_spec(self, batch: int) -> Batch:
        """A batch as shapes and dtypes (jax.ShapeDtypeStruct), without touching any data."""
        one = self.build(stack([self.blank()]))
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((batch, *leaf.shape[1:]), leaf.dtype), one)

    def fake(self, batch: int, seed: int) -> Batch:
        """Random rows of the same spec: at least one token in each text, targets only where the task has some."""
        rng = np.random.default_rng(seed)
        return self.build(stack([self.template.invent(rng, number) for number in range(batch)]))

    def questions(self, count: int, split: str = "test") -> list[Example]:
        """Examples of a split, spread evenly over it, as prompts: without what is made. Bad ones are left out.

        Raises as `rows`.
        """
        have, found = rows_of(self.source, split), []
        for index in np.arange(min(count, have)) * have // min(count, have):
            number = int(numbers_of(self.source, split, np.asarray(index)))
            try:
                found.append(self.template.question(example_of(self.source, number)))
            except BadRow:
                continue
        return found

    def invented_question(self) -> Example:
        """A prompt that needs no data, and no tokenizer."""
        return self.template.invented_question()

    def prompt(self, examples: Sequence[Mapping[str, Any]], null: bool = False) -> tuple[Layout, Batch]:
        """Rows to be completed, and their layout.

        A name in `fill` that an example lacks is to be made: zeros, all of it target, all of it valid. One that it has
        is given. A text that is to be made may have a beginning, "prompt", which is given with the tokens that every
        row begins with. `null` drops the conditions, as training does for guidance, and keeps the first token.

        Raises ValueError for what does not fit, or cannot be encoded.
        """
        named = [as_example(example, f"prompt {number}") for number, example in enumerate(examples)]
        try:
            return self.template.prompt(named, null)
        except BadRow as error:
            raise ValueError(f"tasks.{self.name}: {error}") from error
