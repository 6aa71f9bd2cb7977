"""Digits drawn from class labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from src.data.sources.digits import Digits
from src.evals.drawing import IMAGES, check_images, sample_grid, score_drawings, wanted_digits
from src.evals.result import Result
from src.evals.tasks import find_task, images_of


class LabelsEvaluator:
    """Evaluates the task named `draw` by `images` drawings, as many of each class.

    digit_accuracy, judge_accuracy, frechet_distance, frechet_floor, fdpx, fdpx_at_held_out and their floors: see
    `drawing.score_drawings`. Picture: drawings below their labels, red where wrong.

    Raises ValueError if the task is missing or does something else, or for a number of images out of range.
    """

    def __init__(self, tasks: Mapping[str, Any], *, draw: str = "label_to_image", images: int = IMAGES):
        check_images("labels", images)
        self.draw, self.images = draw, images
        self._draw = find_task(tasks, "labels", "draw", draw, Digits, "label", "image")

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Draws and judges; `seed` decides the noise of the drawings."""
        wanted = wanted_digits(self.images)
        given = [{"label": int(digit)} for digit in wanted]
        images = images_of(pipeline, self.draw, self._draw, given, seed)
        scalars, right = score_drawings(images, wanted, self._draw.source.shift)
        return Result(scalars, {"samples": sample_grid(images, [str(digit) for digit in wanted], right)})
