"""Frames that follow from given ones, against the right ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from src.codecs.chain import decode_compiled, encode_compiled
from src.data.sources.digits import SIZE
from src.data.sources.moving_digits import DIRECTIONS, MovingDigits, frames_of, places_of
from src.evals.frechet import frechet_distance
from src.evals.grid import caption_grid
from src.evals.result import Result, check_counts
from src.evals.tasks import find_task, images_of

PATCH = 2  # pixels of a side of the patches that are mixed
SHOWN = 10


class MovingDigitsEvaluator:
    """Predicts the frames of `clips` held-out clips from those that the task `predict` is given.

    motion_accuracy        share of predicted frames that, of all places of the digit, are nearest to the right one;
                           motion_accuracy_still: of the last given frame, repeated
    pixel_error            mean squared error to the right frames, in pixels in [0, 1]; pixel_error_still, and
                           pixel_error_codes of the right frames after the codec
    fdpx                   Frechet distance of all predicted frames to as many training ones, in such pixels;
                           fdpx_floor_held_out of the right frames, fdpx_floor_codes of these after the codec,
                           fdpx_floor_patches of frames whose patches come from different frames

    Raises ValueError for a task that is missing or does something else, and less than 2 clips.
    """

    def __init__(self, tasks: Mapping[str, Any], *, predict: str = "predict", clips: int = 360):
        check_counts("moving_digits", clips=clips)
        self.predict, self.clips = predict, clips
        self._task = find_task(tasks, "moving_digits", "predict", predict, MovingDigits, "label", "image")
        self.given = getattr(self._task.template, "rows_given", 0) // SIZE  # frames
        if clips < 2 or not self.given:
            raise ValueError(f"evaluator moving_digits has clips={clips}: give 2 or more, and a task with given frames")

    def __call__(self, pipeline: Any, seed: int) -> Result:
        """Predicts and judges; `seed` decides what is drawn."""
        source = self._task.source
        trained = len(source) - source.held_out
        real = [source[trained + number % source.held_out] for number in range(self.clips)]
        asked = [self._task.template.question(example) for example in real]
        made = images_of(pipeline, self.predict, self._task, asked, seed)
        right = np.stack([example["image"] for example in real])
        codec = pipeline.fields[self._task.fill[0]].codec
        coded = np.asarray(decode_compiled(codec, encode_compiled(codec, right)))
        train = np.stack([source[number * trained // self.clips]["image"] for number in range(self.clips)])
        scalars, hits = score_frames(*(frames_of(each) for each in (made, right, coded, train)), self.given)
        return Result(scalars, {"clips": _grid(frames_of(made), [example["label"] for example in real], hits)})


def score_frames(
    made: Float[np.ndarray, "n frames 8 8 1"],
    right: Float[np.ndarray, "n frames 8 8 1"],
    coded: Float[np.ndarray, "n frames 8 8 1"],
    train: Float[np.ndarray, "n frames 8 8 1"],
    given: int,
) -> tuple[dict[str, float], np.ndarray]:
    """The numbers of `MovingDigitsEvaluator`, and which of the predicted frames are at the right place [n, frames]."""
    unit = lambda clips: (np.clip(clips[:, given:], -1, 1) + 1) / 2
    still = np.repeat(right[:, given - 1 : given], right.shape[1], axis=1)
    places = lambda clips: np.stack([places_of(c, r[0]) for c, r in zip(clips, right, strict=True)])[:, given:]
    hits = (places(made) == places(right)).all(axis=-1)
    flat = lambda clips: unit(clips).reshape(-1, made[0, 0].size)
    error = lambda clips: float(((unit(clips) - unit(right)) ** 2).mean())
    distance = lambda frames: frechet_distance(frames, flat(train))
    return {
        "motion_accuracy": float(hits.mean()),
        "motion_accuracy_still": float((places(still) == places(right)).all(axis=-1).mean()),
        "pixel_error": error(made),
        "pixel_error_codes": error(coded),
        "pixel_error_still": error(still),
        "fdpx": distance(flat(made)),
        "fdpx_floor_held_out": distance(flat(right)),
        "fdpx_floor_codes": distance(flat(coded)),
        "fdpx_floor_patches": distance(_mixed(unit(train)).reshape(-1, made[0, 0].size)),
    }, hits


def _mixed(frames: Float[np.ndarray, "n f 8 8 1"]) -> Float[np.ndarray, "m 8 8 1"]:
    """Frames each of whose patches is that of another frame."""
    frames = frames.reshape(-1, *frames.shape[2:])
    rng, mixed = np.random.RandomState(2), np.empty_like(frames)
    for top in range(0, frames.shape[1], PATCH):
        for left in range(0, frames.shape[2], PATCH):
            here = np.s_[:, top : top + PATCH, left : left + PATCH]
            mixed[here] = frames[rng.permutation(len(frames))][here]
    return mixed


def _grid(made: np.ndarray, labels: list[int], hits: np.ndarray) -> np.ndarray:
    """Clips as columns, red where a predicted frame is at another place."""
    shown = min(SHOWN, len(made))
    columns = [np.concatenate(clip) for clip in made[:shown]]
    names = list(DIRECTIONS)
    colors = ["black" if hits[i].all() else "red" for i in range(shown)]
    return caption_grid(np.stack(columns), [names[label] for label in labels[:shown]], shown, colors=colors)
