"""Digits drawn from class labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.labels import LabelToImage
from src.evals.drawing import IMAGES, check_images, sample_grid, score_drawings, wanted_digits
from src.evals.result import Result, find_task


class Labels:
    """Evaluates the task named `draw` by `images` drawings, as many of each class.

    digit_accuracy, judge_accuracy, frechet_distance, frechet_floor: see `drawing.score_drawings`. Picture: drawings
    below their labels, red where wrong.

    Raises ValueError if the task is missing or of another class, or for a number of images out of range.
    """

    def __init__(self, tasks: Mapping[str, Any], *, draw: str = "label_to_image", images: int = IMAGES):
        check_images("Labels", images)
        self.draw, self.images = draw, images
        self._draw = find_task(tasks, "Labels", "draw", draw, LabelToImage)

    def __call__(self, predict: Any, seed: int) -> Result:
        """Draws and judges; `seed` decides the noise of the drawings."""
        wanted = wanted_digits(self.images)
        images = predict.draw(self.draw, labels=wanted.tolist(), seed=seed)
        scalars, right = score_drawings(images, wanted, self._draw.shift)
        return Result(scalars, {"samples": sample_grid(images, [str(digit) for digit in wanted], right)})
