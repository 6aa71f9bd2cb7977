"""A generated corpus of arithmetic in which questions have several right answers, and every answer can be judged.

    three for seven is three plus four ; four plus three             two orders: two right answers
    seven is zero plus seven ; … ; three plus four ; …               all sums: eight right answers
    count two and five is two three four five ; five four three two  up or down: two right answers

Every question has another form, and both exist in numerals, "7 is 3 plus 4". A task with one right answer cannot tell
decoders apart: tokens that are drawn together, each from its own distribution, give the right answer where there is
one, and a mixture of the right ones where there are several. `ceiling` has the share of right answers of a perfect
network that draws all tokens of an answer at once.

A tenth of the questions is held out, each in one of four forms; every fact is trained in the three others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from src.data.example import Example
from src.data.sources.numbers import HELD_OUT, WORDS

LARGEST = 9
Say = Callable[[int], str]
Facts = tuple[tuple[str, ...], tuple[str, ...]]  # the forms of a question, and its right answers


class _Question(NamedTuple):
    """A question, all its right answers, and its kind."""

    prompt: str
    answers: tuple[str, ...]
    kind: str


def _orders(say: Say) -> list[Facts]:
    pairs = [(n, a) for n in range(LARGEST + 1) for a in range(n // 2 + 1) if 2 * a != n]
    both = lambda n, a: (f"{say(a)} plus {say(n - a)}", f"{say(n - a)} plus {say(a)}")
    return [((f"{say(a)} for {say(n)} is", f"{say(n)} with {say(a)} is"), both(n, a)) for n, a in pairs]


def _sums(say: Say) -> list[Facts]:
    every = lambda n: tuple(f"{say(a)} plus {say(n - a)}" for a in range(n + 1))
    return [((f"{say(n)} is", f"a sum of {say(n)} is"), every(n)) for n in range(LARGEST + 1)]


def _counts(say: Say) -> list[Facts]:
    pairs = [(a, b) for a in range(LARGEST + 1) for b in range(a + 2, min(a + 7, LARGEST) + 1)]
    up = lambda a, b: [say(n) for n in range(a, b + 1)]
    both = lambda a, b: (" ".join(up(a, b)), " ".join(reversed(up(a, b))))
    return [((f"count {say(a)} and {say(b)} is", f"all of {say(a)} and {say(b)} is"), both(a, b)) for a, b in pairs]


KINDS = {"order": _orders, "sum": _sums, "count": _counts}


@functools.cache
def questions(split: str, kinds: tuple[str, ...] = tuple(KINDS)) -> tuple[_Question, ...]:
    """The questions of "train" or "test" (held out), in a fixed order. Raises ValueError for an unknown kind."""
    if not kinds or set(kinds) - set(KINDS):
        raise ValueError(
            f"unknown kinds of arithmetic {sorted(set(kinds) - set(KINDS))}: use some of {', '.join(KINDS)}"
        )
    found: list[_Question] = []
    for kind in kinds:
        styles = [KINDS[kind](say) for say in (WORDS.__getitem__, str)]
        facts = [[_Question(p, a, kind) for forms, a in fact for p in forms] for fact in zip(*styles, strict=True)]
        count = round(HELD_OUT * sum(map(len, facts)))
        order = np.random.RandomState(0).permutation(len(facts))[:count]
        held = {int(fact): number % len(facts[fact]) for number, fact in enumerate(order)}
        for fact, forms in enumerate(facts):
            found += [q for form, q in enumerate(forms) if (held.get(fact) == form) == (split == "test")]
    return tuple(found)


def ceiling(question: _Question) -> float:
    """The share of right answers where each word is drawn from its own exact distribution, apart from the others.

    All right answers are equally likely and have the same number of words. Words that are several tokens are drawn
    whole here: a token is at best as good.
    """
    words = [answer.split() for answer in question.answers]
    shares = [{word: column.count(word) / len(words) for word in column} for column in zip(*words, strict=True)]
    return float(sum(np.prod([share[w] for share, w in zip(shares, answer, strict=True)]) for answer in words))


class Arithmetic:
    """`text`, a question with one of its right answers; its `prompt` and its `answer`. `kinds` chooses some."""

    def __init__(self, *, kinds: Sequence[str] = tuple(KINDS)):
        self.kinds = tuple(kinds)
        splits = {split: self._examples(split) for split in ("train", "test")}
        self.held_out = len(splits["test"])
        self.sentences = [*splits["train"], *splits["test"]]

    def _examples(self, split: str) -> list[tuple[_Question, str]]:
        """Each question as often as the others: its right answers in turn."""
        asked = questions(split, self.kinds)
        most = max(len(question.answers) for question in asked)
        return [(q, q.answers[turn % len(q.answers)]) for turn in range(most) for q in asked]

    def __len__(self) -> int:
        return len(self.sentences)

    def __getitem__(self, number: int) -> Example:
        question, answer = self.sentences[number]
        said = {"text": f"{question.prompt} {answer}", "prompt": question.prompt, "answer": answer}
        return Example(said, f"sentence {number}")

    def every(self, name: str) -> list[str]:
        """All sentences, each once."""
        return [
            f"{q.prompt} {a}" for split in ("train", "test") for q in questions(split, self.kinds) for a in q.answers
        ]

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer is trained on."""
        return tuple(f"{q.prompt} {a}" for q in questions("train", self.kinds) for a in q.answers)

    def asked(self, split: str) -> list[_Question]:
        """The questions of a split."""
        return list(questions(split, self.kinds))

    def right(self, prompt: str, answer: str) -> bool:
        """Whether an answer is one of the right ones, white space aside. Raises KeyError for an unknown question."""
        return " ".join(answer.split()) in self._answers[prompt]

    @functools.cached_property
    def _answers(self) -> dict[str, tuple[str, ...]]:
        return {q.prompt: q.answers for split in ("train", "test") for q in questions(split, self.kinds)}
