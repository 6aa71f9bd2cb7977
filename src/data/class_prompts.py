"""The words of class-conditional tasks: the class's name in one of a few phrases, before the image."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from src.data.rows import RowTask, TextTable, check_split, choose, prompt_field, tail_table, text_table
from src.interfaces import TokenField
from src.sequence.layout import Segment

PHRASES = {
    "fixed": ("Please generate an image of {c}.", "{c}", "an image of {c}.", "a photo of {c}."),
    # MonoFormer's public code, with its article, and the code that its released weights were trained with
    "official": ("Please generate an image of {c}.", "{c}", "an image of {c}.", "an photo of {c}."),
    "released": ("Please generate an image of {c}.", "{c}", "an image of {c}."),
}


class ClassPrompts(RowTask):
    """prompt(text) = <s> words <|im_start|>, image, tail(text) = <|im_end|> </s>, without text loss.

    The words are one of the phrases with the class's name, at random in training, the first in "test"; they are dropped
    with probability `drop`. With `newline` a line break stands before </s>, two tokens, as in the official data
    (nothing sees it). `prompt_length` counts <s> and <|im_start|>; longer prompts are refused when the data are opened.

    Subclasses have `names`, those of the classes.
    """

    draws = 2
    names: list[str]

    def set_words(
        self, codec: Any, prompt_length: int, image: Segment, *, drop: float, newline: bool, phrases: str = "fixed"
    ) -> None:
        """Fixes the layout around the segment `image`.

        Raises ValueError for unknown `phrases`.
        """
        if phrases not in PHRASES:
            raise ValueError(f"phrases={phrases!r} are unknown: use one of {', '.join(PHRASES)}")
        self.codec, self.drop, self.phrases, self._newline = codec, drop, PHRASES[phrases], newline
        tail = Segment("tail", "text", 4 if newline else 2)
        self.segments = (Segment("prompt", "text", prompt_length), image, tail)

    @functools.cached_property
    def _tail(self) -> TextTable:
        return tail_table(self.codec, self._newline)

    @functools.cached_property
    def _prompts(self) -> TextTable:
        codec = self.codec
        words = [codec.encode(phrase.format(c=name)) for name in self.names for phrase in self.phrases]
        rows = [[([codec.bos, *ids, codec.image_start], False)] for ids in (*words, [])]
        return text_table(rows, codec.pad, self.segments[0].length)

    def check_words(self) -> None:
        """Raises ValueError for a prompt that does not fit."""
        _ = self._prompts

    def words(self, labels: np.ndarray, uniforms: np.ndarray | None) -> dict[str, TokenField]:
        """Fields `prompt` and `tail` of the classes [B]: uniforms [B, 2] are phrase, drop."""
        text = labels * len(self.phrases)
        if uniforms is not None:
            text = text + choose(uniforms[:, 0], len(self.phrases))
            text = np.where(uniforms[:, 1] < self.drop, len(self.names) * len(self.phrases), text)
        return {"prompt": self._prompts.take(text), "tail": self._tail.take(np.zeros(len(labels), np.int64))}

    def prompts(self, split: str) -> list[tuple[str, int]]:
        """(first phrase, class) of every class; the phrases are not split."""
        check_split(self.name, split)
        return [(self.phrases[0].format(c=name), i) for i, name in enumerate(self.names)]

    def encode_prompt(self, words: str = "") -> TokenField:
        """Field `prompt` [1, N] of any words; without words the empty prompt, for guidance.

        Raises ValueError if the words have unknown characters or do not fit into the segment.
        """
        ids = [self.codec.bos, *(self.codec.encode(words) if words else ()), self.codec.image_start]
        return prompt_field(words, ids, self.segments[0].length, self.codec.pad)
