"""Answers about images, captions, and other texts that a task makes for held-out rows, against those of the data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging

from src.data.example import BadRow, Example, texts_of, turns_of
from src.data.splits import example_of, numbers_of
from src.evals.language.text_scores import bleu, cider_d, normalized, rouge_l, vqa_accuracy
from src.evals.result import Result, bullets, check_counts, same_words, spread
from src.evals.tasks import texts_of as made_of

SHOWN = 12
CUT = 300  # characters of a text that is shown


class AnswersEvaluator:
    """Evaluates one task that makes text, on at most `rows` of its held-out rows, evenly spread.

    task      its name: a template whose text is made, such as picture_chat, chat or image_to_caption
    prefix    stands before the names of the numbers, where several evaluators are of this kind

    exact_match   share of texts that are the reference but for white space
    vqa_accuracy  the same after VQA v2's normalization; of several references min(matches / 3, 1)
    bleu_4        of the whole set
    rouge_l       mean
    cider_d       of the whole set
    rows          rows that were answered; bad ones, and questions that are too long, are left out and logged

    References are the last turn of a chat, all captions of an image, or the example's `answers` (a list of texts),
    without the beginning that is given ("prompt").
    Raises ValueError for a task that is missing, makes no text, or has no held-out rows.
    """

    def __init__(self, tasks: Mapping[str, Any], *, task: str = "picture_chat", rows: int = 1000, prefix: str = ""):
        check_counts("answers", rows=rows)
        if task not in tasks:
            raise ValueError(f"evaluator answers has task={task!r}, and there are {', '.join(tasks)}: set task to one")
        found = tasks[task]
        self._reference = next((name for name in found.template.answers if name != "image"), "")
        if len(found.fill) != 1 or not self._reference:
            raise ValueError(f"evaluator answers has task={task!r}, which makes {', '.join(found.fill)} and not a text")
        if not rows:
            raise ValueError("evaluator answers has rows=0, so that nothing is evaluated: give at least 1")
        self.task, self.rows, self.prefix, self._task = task, rows, prefix, found

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Makes the texts and scores them."""
        given, references, left_out = self._questions(pipeline)
        if not given:
            raise ValueError(f"evaluator answers: task {self.task} has no sound held-out rows")
        if left_out:
            logging.warning("evaluator answers: %d held-out rows of %s are left out", left_out, self.task)
        said = made_of(pipeline, self.task, self._task, given, seed)
        pairs = list(zip(said, references, strict=True))
        scalars = {
            "exact_match": float(np.mean([any(same_words(text, each) for each in meant) for text, meant in pairs])),
            "vqa_accuracy": float(np.mean([vqa_accuracy(text, meant) for text, meant in pairs])),
            "bleu_4": bleu(said, references),
            "rouge_l": float(np.mean([rouge_l(text, meant) for text, meant in pairs])),
            "cider_d": cider_d(said, references),
            "rows": float(len(pairs)),
        }
        lines = [self._line(given[i], *pairs[i]) for i in spread(len(pairs), SHOWN)]
        named = {f"{self.prefix}{name}": value for name, value in scalars.items()}
        return Result(named, {}, {f"{self.prefix}answers": bullets(lines)})

    def _questions(self, pipeline: Any) -> tuple[list[Example], list[list[str]], int]:
        """The prompts, their references, and how many rows are left out."""
        source, template = self._task.source, self._task.template
        have, given, references = self._task.rows("test"), [], []
        numbers = numbers_of(source, "test", spread(have, self.rows)).tolist()
        for number in numbers:
            try:
                example = example_of(source, number)
                question = template.question(example)
                begin = question["prompt"] if isinstance(question.get("prompt"), str) else ""
                meant = [text.removeprefix(begin) for text in self._texts(example)]
            except BadRow:
                continue
            try:
                pipeline.check(self.task, [question])
            except ValueError:
                continue
            given.append(question)
            references.append(meant)
        return given, references, len(numbers) - len(given)

    def _texts(self, example: Example) -> list[str]:
        """The references of an example. Raises BadRow."""
        if isinstance(several := example.get("answers"), list) and several:
            return [str(each) for each in several]
        if self._reference == "turns":
            return [turns_of(example)[-1]]
        return list(texts_of(example, self._reference))

    def _line(self, question: Example, text: str, meant: list[str]) -> str:
        asked = (question.get("turns") or [question.get("prompt") or ""])[-1]
        right = normalized(text) in map(normalized, meant)
        told = " ".join(f"{asked} **{text.strip()}**".split())[:CUT]
        return told + ("" if right else f" (meant: {' '.join(meant[0].split())[:CUT]})")
