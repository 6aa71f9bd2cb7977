"""Canvases of several digits drawn from captions, and captions written for canvases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from src.data.sources import canvas
from src.data.sources.canvas import EMPTY
from src.data.sources.digits import SIZE
from src.evals.grid import caption_grid
from src.evals.judge import finite, judge
from src.evals.result import Result, bullets, check_counts, spread
from src.evals.tasks import find_task, images_of, texts_of

LEAST_INK = 0.08  # half of what the palest real digit has; mean of a cell's pixels in [0, 1]
SHOWN, COLUMNS = 24, 6
REFERENCE = 720


class CanvasEvaluator:
    """Evaluates the tasks named `draw` and `caption` in the config; None, or a count of 0, leaves one out.

    draw      on `canvases` drawings, asked for by the captions of the held-out canvases:
              canvas_accuracy: share of the canvases with the right digit, or nothing, in all four cells
              canvas_accuracy_1 .. _4: the same for the captions with so many digits
              cell_accuracy: share of all cells that are right, empty ones included
              digit_accuracy: share of right cells among those that should hold a digit
              canvas_judge_accuracy: canvas_accuracy of real held-out canvases, shifted as in training
              judge_accuracy: of the judge of single digits, on held-out digits at all such shifts
    caption   on at most `captions` held-out canvases:
              caption_accuracy: share of freely generated captions that name the right digit in every filled cell, and
              no more; caption_accuracy_1 .. _4: the same for the canvases with so many digits

    Pictures: drawings below their captions and held-out canvases below what was written, red where wrong.
    Raises ValueError if a named task is missing or does something else, if both are left out, or for a negative count.
    """

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        draw: str | None = "canvas_caption_to_image",
        caption: str | None = "canvas_image_to_caption",
        canvases: int = canvas.TEST_ROWS,
        captions: int = canvas.TEST_ROWS,
    ):
        check_counts("canvas", canvases=canvases, captions=captions)
        self.draw, self.caption = (draw if canvases else None), (caption if captions else None)
        if not any((self.draw, self.caption)):
            raise ValueError("evaluator canvas has nothing to evaluate: name a task as draw or caption")
        self.canvases, self.captions = canvases, captions
        find = lambda option, *what: find_task(tasks, "canvas", option, getattr(self, option), canvas.Canvas, *what)
        if self.draw is not None:
            self._draw = find("draw", "caption", "image")
        if self.caption is not None:
            self._caption = find("caption", "image", "caption")

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Runs the parts; `seed` decides the noise of the drawings."""
        result = Result({}, {}, {})
        if self.draw is not None:
            self._drawings(pipeline, seed, result)
        if self.caption is not None:
            self._captions(pipeline, seed, result)
        return result

    def _drawings(self, pipeline: Any, seed: int, result: Result) -> None:
        # More canvases than descriptions: the descriptions come again, with other noise.
        source, have = self._draw.source, canvas.TEST_ROWS
        chosen = spread(have, self.canvases) if self.canvases <= have else np.arange(self.canvases) % have
        _, wanted = source.canvases("test", chosen, None)
        words = [canvas.caption(label) for label in wanted]
        given = [{"caption": text} for text in words]
        images, whole = finite(images_of(pipeline, self.draw, self._draw, given, seed))
        right = (read_canvases(images) == wanted) & whole[:, None]
        result.scalars.update(
            _by_count("canvas_accuracy", right.all(1), wanted),
            cell_accuracy=float(right.mean()),
            digit_accuracy=float(right[wanted != EMPTY].mean()),
            canvas_judge_accuracy=_real_accuracy(source),
            judge_accuracy=judge().accuracy(source.shift),
        )
        result.images["samples"] = _grid(images, words, right.all(1))

    def _captions(self, pipeline: Any, seed: int, result: Result) -> None:
        images, labels = self._caption.source.canvases("test", spread(canvas.TEST_ROWS, self.captions), None)
        texts = texts_of(pipeline, self.caption, self._caption, [{"image": image} for image in images], seed)
        meant = [canvas.cells(label) for label in labels]
        right = np.array([canvas.parse_caption(said) == m for said, m in zip(texts, meant, strict=True)])
        result.scalars.update(_by_count("caption_accuracy", right, labels))
        result.images["captions"] = _grid(images, texts, right)
        wrong = [f"{texts[i].strip()} (wrong, it is {canvas.caption(labels[i])})" for i in np.flatnonzero(~right)[:8]]
        shown = [texts[i].strip() for i in np.flatnonzero(right)[:4]]
        result.texts["captions"] = bullets(shown + wrong)


def read_canvases(images: Float[np.ndarray, "n size size 1"]) -> Int[np.ndarray, "n 4"]:
    """Digit in each cell, row-major, -1 where there is less ink than in any digit.

    A digit lies in the middle of its cell, where it is read from 8 x 8 pixels.
    Raises ValueError if the images are no canvases.
    """
    size = images.shape[1] if images.ndim == 4 else 0
    if images.shape[1:] != (size, size, 1) or size % 2 or size < 2 * SIZE:
        raise ValueError(f"canvases have the shape [n, size, size, 1] with even size >= 16, not {list(images.shape)}")
    side = size // 2
    start = (side - SIZE) // 2
    cells = images.reshape(-1, 2, side, 2, side, 1).transpose(0, 1, 3, 2, 4, 5).reshape(-1, side, side, 1)
    window = cells[:, start : start + SIZE, start : start + SIZE]
    ink = (np.clip(window, -1, 1).mean(axis=(1, 2, 3)) + 1) / 2
    return np.where(ink < LEAST_INK, EMPTY, judge().predict(window)).reshape(-1, 4)


def _real_accuracy(source: Any) -> float:
    uniforms = np.random.RandomState(0).random_sample((REFERENCE, source.draws + 1))  # as many as there once were
    images, labels = source.canvases("test", np.arange(REFERENCE), uniforms)
    return float((read_canvases(images) == labels).all(1).mean())


def _by_count(name: str, right: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    count = (labels != EMPTY).sum(1)
    each = {f"{name}_{n}": float(right[count == n].mean()) for n in range(1, 5) if (count == n).any()}
    return {name: float(right.mean()), **each}


def _grid(images: np.ndarray, captions: list[str], right: np.ndarray) -> np.ndarray:
    shown = spread(len(images), SHOWN)
    colors = ["black" if right[i] else "red" for i in shown]
    return caption_grid(images[shown], [captions[i] for i in shown], COLUMNS, colors=colors)
