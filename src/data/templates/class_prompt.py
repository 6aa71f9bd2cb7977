"""The name of a class in one of a few phrases, then an image: `<s> words <|im_start|>`, image, `<|im_end|> </s>`."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from src.common.tree import listed
from src.data.example import Example, Source, label_of
from src.data.templates.caption_to_image import CaptionToImage
from src.interfaces import Field

PHRASES = {
    "fixed": ("Please generate an image of {c}.", "{c}", "an image of {c}.", "a photo of {c}."),
    # MonoFormer's public code, with its article, and the code that its released weights were trained with
    "official": ("Please generate an image of {c}.", "{c}", "an image of {c}.", "an photo of {c}."),
    "released": ("Please generate an image of {c}.", "{c}", "an image of {c}."),
}


class ClassPrompt(CaptionToImage):
    """`CaptionToImage` whose text is the name of the example's `label` in one of the `phrases`, at random in training
    and the first one else. The source has the names (`classes`).

    phrases   fixed | official | released: see `PHRASES`
    length    tokens of the prompt with <s> and <|im_start|>; longer prompts are refused when the data are opened

    A prompt has the text itself as `caption`, or a `label`.
    """

    def __init__(
        self,
        length: int | None = None,
        *,
        row_length: int | None = None,
        phrases: str = "fixed",
        drop: float = 0.1,
        text_loss: bool = False,
        newline: bool = False,
        text: str = "text",
        image: str = "image",
        segment: Mapping[str, Any] | None = None,
        buckets: Sequence[Sequence[int]] = (),
    ):
        if phrases not in PHRASES:
            raise ValueError(f"phrases={phrases!r} are unknown: use one of {', '.join(PHRASES)}")
        more = {"text": text, "image": image, "segment": segment, "buckets": buckets}
        super().__init__(length, row_length=row_length, drop=drop, text_loss=text_loss, newline=newline, **more)
        self.phrases, self.needs = PHRASES[phrases], ("label", "image")

    def bind(self, fields: Mapping[str, Field], source: Source) -> None:
        """See `Template.bind`."""
        self._source = source
        super().bind(fields, source)

    @functools.cached_property
    def names(self) -> list[str]:
        """Names of the classes. Raises as `names_of`."""
        return names_of(self._source)

    def room(self, source: Source | None, fixed: int) -> int:
        """Tokens of the prompt: the names are known when the data are opened."""
        return super().room(None, fixed)

    def check(self, source: Source) -> None:
        """Also refuses classes without a name and prompts that do not fit, before the first row."""
        super().check(source)
        room, codec = self.columns[0].length, self.codec
        for name in self.names:
            for phrase in self.phrases:
                if 2 + len(codec.encode(phrase.format(c=name))) > room:
                    said = phrase.format(c=name)
                    raise ValueError(f"prompt {said!r} does not fit into length={room} tokens: give a larger length")

    def texts(self, example: Example) -> list[str]:
        """The phrases for the class of an example. Raises BadRow."""
        if example.get("label") is None and "caption" in example:
            return [example["caption"]]
        name = self.names[label_of(example, len(self.names))]
        return [phrase.format(c=name) for phrase in self.phrases]

    def has_text(self, example: Example) -> bool:
        """Whether a prompt says what to draw."""
        return example.get("label") is not None or example.get("caption") is not None

    def which(self, index: int, count: int) -> int:
        """The text of a row in the ordered pass."""
        return 0


def names_of(source: Source) -> list[str]:
    """Names of a source's classes. Raises ValueError where it has none, or a class without a name."""
    classes = getattr(source, "classes", ())
    if not classes:
        raise ValueError("the source has no classes: choose another template, or a source with `classes`")
    if missing := [c["id"] for c in classes if not c["name"]]:
        raise ValueError(
            f"{len(missing)} of {len(classes)} classes have an id and no name ({listed(missing, 3)}): give a JSON file"
            ' {"n01440764": "tench", …} as source.names'
        )
    return [c["name"] for c in classes]
