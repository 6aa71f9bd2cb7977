"""A small language of true sentences about numbers 0 .. 18, each with one right ending.

    three plus four is seven            the sum of three and four is seven
    nine minus two is seven             taking two from nine leaves seven
    the number after six is seven       after six comes seven
    the larger of two and seven is seven

Every sentence also exists in numerals, "3 plus 4 is 7". A *fact* is a relation with its operands, a *form* a template
in one of the two styles. The held-out sentences are a tenth of all: of some facts one form each, so that every fact is
still trained in another form.

Beside it the phrases for single digits, which `digits.py` has pictures of: both share one tokenizer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import numpy as np

from src.data.example import Example

_NAMES = (
    "zero one two three four five six seven eight nine "
    "ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen"
)
WORDS = tuple(_NAMES.split())
HELD_OUT = 0.1
PHRASES = (
    "a handwritten {w}",
    "a handwritten {d}",
    "the digit {w}",
    "the digit {d}",
    "the number {w}",
    "the number {d}",
    "draw {a} {w}",
    "draw {a} {d}",
    "an image of {a} {w}",
    "an image of {a} {d}",
    "{w}",
    "{d}",
)


@dataclasses.dataclass(frozen=True)
class _Relation:
    """`templates` use {a}, {b} and end before the answer, which is `answer(a, b)`; `pairs` are the operands."""

    templates: tuple[str, ...]
    pairs: tuple[tuple[int, int], ...]
    answer: Callable[[int, int], int]


_DIGITS = range(10)
RELATIONS = {
    "sum": _Relation(
        ("{a} plus {b} is", "the sum of {a} and {b} is"),
        tuple((a, b) for a in _DIGITS for b in _DIGITS),
        lambda a, b: a + b,
    ),
    "difference": _Relation(
        ("{a} minus {b} is", "taking {b} from {a} leaves"),
        tuple((a, b) for a in _DIGITS for b in _DIGITS if a >= b),
        lambda a, b: a - b,
    ),
    "successor": _Relation(
        ("the number after {a} is", "after {a} comes"), tuple((a, 0) for a in range(18)), lambda a, b: a + 1
    ),
    "larger": _Relation(
        ("the larger of {a} and {b} is",),
        tuple((a, b) for a in _DIGITS for b in _DIGITS if a != b),
        lambda a, b: max(a, b),
    ),
}


@dataclasses.dataclass(frozen=True)
class _Sentence:
    """`prompt` and `answer` make the sentence; `fact` names relation and operands, `form` the template and style."""

    prompt: str
    answer: str
    fact: str
    form: str

    @property
    def text(self) -> str:
        """The whole sentence."""
        return f"{self.prompt} {self.answer}"


def sentences(split: str, relations: Sequence[str] = tuple(RELATIONS)) -> list[_Sentence]:
    """The sentences of "train" or "test" (held out), in a fixed order.

    Raises ValueError for an unknown relation.
    """
    unknown = set(relations) - set(RELATIONS)
    if unknown or not relations:
        raise ValueError(f"unknown number relations {sorted(unknown)}: use some of {', '.join(RELATIONS)}")
    chosen = []
    for name in relations:
        forms = [_forms(name, pair) for pair in RELATIONS[name].pairs]
        count = round(HELD_OUT * sum(map(len, forms)))
        # RandomState's stream is frozen in numpy for ever, so that the split is too.
        held = {
            int(fact): i % len(forms[fact])
            for i, fact in enumerate(np.random.RandomState(0).permutation(len(forms))[:count])
        }
        for fact, options in enumerate(forms):
            chosen += [s for i, s in enumerate(options) if (held.get(fact) == i) == (split == "test")]
    return chosen


def _forms(name: str, pair: tuple[int, int]) -> list[_Sentence]:
    relation, (a, b) = RELATIONS[name], pair
    fact = f"{name} {a} {b}"
    return [
        _Sentence(template.format(a=say(a), b=say(b)), say(relation.answer(a, b)), fact, f"{style}: {template}")
        for template in relation.templates
        for style, say in (("words", WORDS.__getitem__), ("numerals", str))
    ]


@functools.cache
def phrases(digit: int) -> tuple[str, ...]:
    """All prompts for a digit, the canonical one first."""
    article = "an" if digit == 8 else "a"
    return tuple(phrase.format(a=article, w=WORDS[digit], d=digit) for phrase in PHRASES)


@functools.cache
def texts() -> tuple[str, ...]:
    """What a tokenizer of digits and numbers is trained on, the same for both sources."""
    said = [p for digit in range(10) for p in phrases(digit)]
    return (*said, *(s.text for s in sentences("train")))


class Numbers:
    """`text`, a sentence; its `prompt` and its `answer`. `relations` chooses a smaller language."""

    def __init__(self, *, relations: Sequence[str] = tuple(RELATIONS)):
        self.relations = tuple(relations)
        test = sentences("test", relations)
        self.held_out = len(test)
        self.sentences = [*sentences("train", relations), *test]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, number: int) -> Example:
        said = self.sentences[number]
        return Example({"text": said.text, "prompt": said.prompt, "answer": said.answer}, f"sentence {number}")

    def every(self, name: str) -> list[str]:
        """All sentences."""
        return [said.text for said in self.sentences]

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer of digits and numbers is trained on, the same for both sources."""
        return texts()

    def asked(self, split: str) -> list[_Sentence]:
        """The sentences of a split; each has a `prompt`."""
        return sentences(split, self.relations)

    def right(self, prompt: str, answer: str) -> bool:
        """Whether an answer is the right one, white space aside. Raises KeyError for an unknown prompt."""
        return answer.split() == self._answers[prompt].split()

    @functools.cached_property
    def _answers(self) -> dict[str, str]:
        return {said.prompt: said.answer for said in self.sentences}
