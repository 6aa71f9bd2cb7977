"""Digits drawn from words, digits put into words, and sentences about numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from src.data.sources import digits, numbers
from src.evals.drawing import IMAGES, check_images, sample_grid, score_drawings, wanted_digits
from src.evals.grid import caption_grid
from src.evals.result import Result, bullets, check_counts, same_words, spread
from src.evals.tasks import find_task, images_of, texts_of

SHOWN = 40


class DigitsEvaluator:
    """Evaluates up to three tasks, whose names in the config are `draw`, `caption` and `complete`; None, or a count of
    0, leaves one out.

    draw      on `images` drawings, all phrasings of all digits in turn: digit_accuracy, judge_accuracy,
              frechet_distance, frechet_floor, fdpx, fdpx_at_held_out and their floors (`drawing.score_drawings`)
    caption   caption_accuracy: share of (at most `captions`) held-out images whose freely generated text is exactly the
              canonical caption, "a handwritten seven"
    complete  text_accuracy: share of (at most `sentences`) held-out sentences about numbers whose freely generated
              ending is exactly the answer; text_accuracy_train: the same for training sentences, evenly spread

    Pictures: drawings below their prompts and held-out images below their generated captions, red where wrong.
    Raises ValueError if a named task is missing or does something else, if all are left out, or for a count out of
    range.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        draw: str | None = "caption_to_image",
        caption: str | None = "image_to_caption",
        complete: str | None = "number_sentences",
        images: int = IMAGES,
        captions: int = 360,
        sentences: int = 200,
    ):
        check_images("digits", images)
        check_counts("digits", captions=captions, sentences=sentences)
        self.draw = draw if images else None
        self.caption = caption if captions else None
        self.complete = complete if sentences else None
        if not any((self.draw, self.caption, self.complete)):
            raise ValueError("evaluator digits has nothing to evaluate: name a task as draw, caption or complete")
        self.images, self.captions, self.sentences = images, captions, sentences
        find = lambda option, *what: find_task(tasks, "digits", option, getattr(self, option), *what)
        if self.draw is not None:
            self._draw = find("draw", digits.Digits, "caption", "image")
        if self.caption is not None:
            self._caption = find("caption", digits.Digits, "image", "caption")
        if self.complete is not None:
            self._complete = find("complete", numbers.Numbers, "prompt", "text")

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Runs the parts; `seed` decides the noise of the drawings."""
        result = Result({}, {}, {})
        if self.draw is not None:
            self._drawings(pipeline, seed, result)
        if self.caption is not None:
            self._captions(pipeline, seed, result)
        if self.complete is not None:
            self._completions(pipeline, seed, result)
        return result

    def _drawings(self, pipeline: Any, seed: int, result: Result) -> None:
        wanted = wanted_digits(self.images)
        said = {digit: numbers.phrases(int(digit)) for digit in range(10)}
        words = [said[digit][i // 10 % len(said[digit])] for i, digit in enumerate(wanted.tolist())]
        images = images_of(pipeline, self.draw, self._draw, [{"caption": text} for text in words], seed)
        scalars, right = score_drawings(images, wanted, self._draw.source.shift)
        result.scalars.update(scalars)
        result.images["samples"] = sample_grid(images, words, right)

    def _captions(self, pipeline: Any, seed: int, result: Result) -> None:
        real = digits.load("test")
        chosen = spread(len(real.labels), self.captions)
        images, labels = real.values[chosen], real.labels[chosen].tolist()
        texts = texts_of(pipeline, self.caption, self._caption, [{"image": image} for image in images], seed)
        right = [same_words(said, digits.caption(digit)) for said, digit in zip(texts, labels, strict=True)]
        result.scalars["caption_accuracy"] = float(np.mean(right))
        shown = spread(len(labels), SHOWN)
        colors = ["black" if right[i] else "red" for i in shown]
        result.images["captions"] = caption_grid(images[shown], [texts[i] for i in shown], 10, colors=colors)

    def _completions(self, pipeline: Any, seed: int, result: Result) -> None:
        for split, scalar in (("test", "text_accuracy"), ("train", "text_accuracy_train")):
            said = numbers.sentences(split, self._complete.source.relations)
            said = [said[i] for i in spread(len(said), self.sentences)]
            texts = texts_of(pipeline, self.complete, self._complete, [{"prompt": s.prompt} for s in said], seed)
            right = [same_words(text, s.answer) for text, s in zip(texts, said, strict=True)]
            result.scalars[scalar] = float(np.mean(right))
            if split == "test":
                lines = [
                    f"{s.prompt} **{text.strip()}**" + ("" if good else f" (wrong, it is {s.answer})")
                    for text, s, good in zip(texts, said, right, strict=True)
                ]
                wrong = [line for line, good in zip(lines, right, strict=True) if not good]
                shown = [lines[i] for i in spread(len(lines), 12)]
                result.texts["completions"] = bullets(shown + [line for line in wrong if line not in shown][:8])
