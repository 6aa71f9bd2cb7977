"""Digits drawn from class labels, by one decoder or by several."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np

from src.data.sources.digits import Digits
from src.evals.drawing import IMAGES, check_images, sample_grid, score_drawings, wanted_digits
from src.evals.grid import caption_grid
from src.evals.result import Result
from src.evals.tasks import find_task, images_of
from src.interfaces import row_of

OWN = ("digit_accuracy", "frechet_distance", "fdpx", "fdpx_at_held_out")  # of the drawings, not of real images


class LabelsEvaluator:
    """Evaluates the task named `draw` by `images` drawings, as many of each class.

    digit_accuracy, judge_accuracy, frechet_distance, frechet_floor, fdpx, fdpx_at_held_out and their floors: see
    `drawing.score_drawings`. Picture: drawings below their labels, red where wrong.

    modes   further decoders by name (`sampling/decoders`), with the same scalars as `<mode>/…`, and `<mode>/calls`, the
            passes of the network that an image needs. Picture: a row of drawings of each

    Raises ValueError if the task is missing or does something else, or for a number of images out of range.
    """

    PARTS: ClassVar[dict[str, str]] = {"modes": "sampling/decoders"}

    def __init__(
        self,
        tasks: Mapping[str, Any],
        *,
        draw: str = "label_to_image",
        images: int = IMAGES,
        modes: Mapping[str, Any] | None = None,
    ):
        check_images("labels", images)
        self.draw, self.images, self.modes = draw, images, dict(modes or {})
        self._draw = find_task(tasks, "labels", "draw", draw, Digits, "label", "image")

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Draws and judges; `seed` decides the noise of the drawings."""
        wanted = wanted_digits(self.images)
        given = [{"label": int(digit)} for digit in wanted]
        images = images_of(pipeline, self.draw, self._draw, given, seed)
        scalars, right = score_drawings(images, wanted, self._draw.source.shift)
        result = Result(scalars, {"samples": sample_grid(images, [str(digit) for digit in wanted], right)})
        rows = []
        for mode, decoder in self.modes.items():
            decoders = {row_of(self._draw.fill[0]): decoder}
            values, calls = pipeline.counted(self.draw, given, seed, decoders=decoders)
            images = np.asarray(values[self._draw.fill[0]])
            scalars, right = score_drawings(images, wanted, self._draw.source.shift)
            scalars = {name: value for name, value in scalars.items() if name in OWN} | {"calls": float(calls.mean())}
            result.scalars.update({f"{mode}/{name}": value for name, value in scalars.items()})
            rows += [(image, mode, good) for image, good in zip(images[:10], right, strict=False)]
        if rows:
            images, modes, goods = zip(*rows, strict=True)
            colors = ["black" if good else "red" for good in goods]
            result.images["modes"] = caption_grid(np.stack(images), list(modes), 10, colors=colors)
        return result
