"""A generated text of three animals, and a summary of what one of them does: any of the three is right.

    today the owl met the cow and the fox . so cow hides in pond

What an animal does, and where, is always the same, so that its name decides the other words and none of them alone
decides its name: a verb is that of four animals, a place that of two. A summary with words of several animals is wrong.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from src.data.example import Example

_ANIMALS = "owl fox cow hen dog cat bee ant bat elk ape ram pig rat yak jay"
ANIMALS = tuple(_ANIMALS.split())
VERBS = ("sleeps", "hunts", "hides", "sings")
PLACES = ("barn", "pond", "tree", "cave", "hill", "yard", "lake", "reed")
COUNT, HELD_OUT = 20_000, 400
LEARNED_FROM, PROMPTS = 2000, 32  # examples whose summaries, and those whose prompts a tokenizer is trained on


def summary(animal: int) -> str:
    """What an animal does."""
    return f"{ANIMALS[animal]} {VERBS[animal % len(VERBS)]} in {PLACES[animal // 2]}"


class Summaries:
    """`text`, three animals with the summary of one of them; its beginning `prompt`, and all `answers`."""

    held_out = HELD_OUT

    def __len__(self) -> int:
        return COUNT + HELD_OUT

    def __getitem__(self, number: int) -> Example:
        met = np.random.RandomState(number).permutation(len(ANIMALS))[:3].tolist()
        first, second, third = (ANIMALS[animal] for animal in met)
        prompt = f"today the {first} met the {second} and the {third} . so"
        answers = [summary(animal) for animal in met]
        said = {"text": f"{prompt} {answers[number % len(answers)]}", "prompt": prompt, "answers": answers}
        return Example(said, f"text {number}")

    def texts(self) -> tuple[str, ...]:
        """What a tokenizer is trained on: summaries, by whose words' frequency the ids are then ordered, and prompts
        of some of them."""
        rows = [self[number] for number in range(LEARNED_FROM)]
        summaries = [row["answers"][number % len(row["answers"])] for number, row in enumerate(rows)]
        return (*summaries, *(row["prompt"] for row in rows[:PROMPTS]))

    def judged(self, asked: Mapping[str, Any], made: str) -> dict[str, float]:
        """`right`: the text is one of the summaries; `form`: its words are of the right kinds, whatever they say;
        `rouge_1`: F1 of its words with those of the nearest summary (Lin 2004)."""
        words = made.split()
        kinds = (ANIMALS, VERBS, ("in",), PLACES)
        form = len(words) == len(kinds) and all(word in kind for word, kind in zip(words, kinds, strict=True))
        scores = [_f1(words, answer.split()) for answer in asked["answers"]]
        return {"right": float(" ".join(words) in asked["answers"]), "form": float(form), "rouge_1": max(scores)}


def _f1(said: list[str], meant: list[str]) -> float:
    """2 · matches / (words of both), a word matching as often as it is in both."""
    matches = sum(min(said.count(word), meant.count(word)) for word in set(meant))
    return 2 * matches / (len(said) + len(meant))
