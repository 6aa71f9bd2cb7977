"""Digits drawn from words, digits put into words, and sentences about numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from src.data import digits
from src.data.digits import CaptionToImage, ImageToCaption, NumberSentences
from src.evals.drawing import IMAGES, check_images, sample_grid, score_drawings, wanted_digits
from src.evals.grid import caption_grid
from src.evals.result import Result, bullets, check_counts, find_task, same_words, spread

SHOWN = 40


class Digits:
    """Evaluates up to three tasks, whose names in the config are `draw`, `caption` and `complete`; None leaves one out.

    draw      digit_accuracy, judge_accuracy, frechet_distance, frechet_floor of `images` drawings, all phrasings of all
              digits in turn: see `drawing.score_drawings`
    caption   caption_accuracy: share of (at most `captions`) held-out images whose freely generated text is exactly the
              canonical caption, "a handwritten seven"
    complete  text_accuracy: share of (at most `sentences`) held-out sentences about numbers whose freely generated
              ending is exactly the answer; text_accuracy_train: the same for training sentences, evenly spread

    Pictures: drawings below their prompts and held-out images below their generated captions, red where wrong.
    Raises ValueError if a named task is missing or of another class, if all are None, or for a count out of range.
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
        check_images("Digits", images)
        check_counts("Digits", captions=captions, sentences=sentences)
        if not any((draw, caption, complete)):
            raise ValueError("evaluator Digits has nothing to evaluate: name a task as draw, caption or complete")
        self.draw, self.caption, self.complete = draw, caption, complete
        self.images, self.captions, self.sentences = images, captions, sentences
        if draw is not None:
            self._draw = find_task(tasks, "Digits", "draw", draw, CaptionToImage)
        if caption is not None:
            self._caption = find_task(tasks, "Digits", "caption", caption, ImageToCaption)
        if complete is not None:
            self._complete = find_task(tasks, "Digits", "complete", complete, NumberSentences)

    def __call__(self, predict: Any, seed: int) -> Result:
        """Runs the parts; `seed` decides the noise of the drawings."""
        result = Result({}, {}, {})
        if self.draw is not None:
            self._drawings(predict, seed, result)
        if self.caption is not None:
            self._captions(predict, seed, result)
        if self.complete is not None:
            self._completions(predict, seed, result)
        return result

    def _drawings(self, predict: Any, seed: int, result: Result) -> None:
        said: list[list[str]] = [[] for _ in range(10)]
        for phrase, digit in self._draw.prompts("test"):
            said[digit].append(phrase)
        wanted = wanted_digits(self.images)
        words = [said[digit][i // 10 % len(said[digit])] for i, digit in enumerate(wanted)]
        images = predict.draw(self.draw, words=words, seed=seed)
        scalars, right = score_drawings(images, wanted, self._draw.shift)
        result.scalars.update(scalars)
        result.images["samples"] = sample_grid(images, words, right)

    def _captions(self, predict: Any, seed: int, result: Result) -> None:
        pairs = self._caption.prompts("test")
        pairs = [pairs[i] for i in spread(len(pairs), self.captions)]
        images = np.stack([image for image, _ in pairs])
        texts = predict.write(self.caption, images=images, seed=seed)
        right = [same_words(said, digits.caption(digit)) for said, (_, digit) in zip(texts, pairs, strict=True)]
        result.scalars["caption_accuracy"] = float(np.mean(right))
        shown = spread(len(pairs), SHOWN)
        colors = ["black" if right[i] else "red" for i in shown]
        result.images["captions"] = caption_grid(images[shown], [texts[i] for i in shown], 10, colors=colors)

    def _completions(self, predict: Any, seed: int, result: Result) -> None:
        for split, scalar in (("test", "text_accuracy"), ("train", "text_accuracy_train")):
            pairs = self._complete.prompts(split)
            pairs = [pairs[i] for i in spread(len(pairs), self.sentences)]
            texts = predict.write(self.complete, words=[prompt for prompt, _ in pairs], seed=seed)
            right = [same_words(said, answer) for said, (_, answer) in zip(texts, pairs, strict=True)]
            result.scalars[scalar] = float(np.mean(right))
            if split == "test":
                lines = [
                    f"{prompt} **{said.strip()}**" + ("" if good else f" (wrong, it is {answer})")
                    for said, (prompt, answer), good in zip(texts, pairs, right, strict=True)
                ]
                wrong = [line for line, good in zip(lines, right, strict=True) if not good]
                shown = [lines[i] for i in spread(len(lines), 12)]
                result.texts["completions"] = bullets(shown + [line for line in wrong if line not in shown][:8])
