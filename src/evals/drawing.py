"""How well digits are drawn on demand: what the evaluators of words and of labels share.

Where the task shifts its training images at random, the real images of the Fréchet distance are shifted by the same
law. The training split gives two halves of 69 different images of each digit; generated samples are as many and as
balanced, so that `frechet_floor` is what a perfect model would get. (Features of held-out images are no farther from
those of a training half, at equal sample size, although the judge learned from both halves.)
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from src.data import digits
from src.data.rows import shift_images, shifts
from src.evals.frechet import frechet_distance
from src.evals.grid import caption_grid
from src.evals.judge import finite, judge

IMAGES = 690  # 69 of each digit: half of the rarest digit's 138 training images
COLUMNS, ROWS = 10, 4


def check_images(evaluator: str, count: int) -> None:
    """Raises ValueError unless `count` images can be balanced over the digits and fit into a real half."""
    if not isinstance(count, int) or count % 10 or not 20 <= count <= IMAGES:
        raise ValueError(f"evaluator {evaluator} has images={count!r}: give a multiple of 10 from 20 to {IMAGES}")


def wanted_digits(count: int) -> Int[np.ndarray, " n"]:
    """0, 1, .. 9, 0, 1, ..: the digits to draw."""
    return np.arange(count) % 10


def real_halves(count: int, shift: int) -> tuple[Float[np.ndarray, "n 8 8 1"], Float[np.ndarray, "n 8 8 1"]]:
    """Two disjoint balanced sets of `count` real training images, shifted at random; always the same ones."""
    images, rng = digits.load("train"), np.random.RandomState(0)
    orders = [rng.permutation(np.flatnonzero(images.labels == digit)) for digit in range(10)]
    each = count // 10
    halves = []
    for start in (0, each):
        rows = np.concatenate([order[start : start + each] for order in orders])
        offsets = shifts(rng.random_sample((count, 2)), shift)
        halves.append(shift_images(images.values[rows], offsets, digits.BACKGROUND))
    return halves[0], halves[1]


def score_drawings(
    images: Float[np.ndarray, "n 8 8 1"], wanted: Int[np.ndarray, " n"], shift: int
) -> tuple[dict[str, float], np.ndarray]:
    """Scalars of n = `check_images` drawn digits, and which of them are right `[n]`.

    digit_accuracy    share of the images that the judge reads as the digit that was asked for
    judge_accuracy    the same for real held-out images at all shifts of the task, as a reference
    frechet_distance  between the judge's features of the drawings and of one half of the real training images
    frechet_floor     the same between the two real halves: what perfect drawings would get

    An image with a value that is not finite is wrong, and the Fréchet distance is then NaN.
    Raises ValueError if the images are not 8 x 8 x 1.
    """
    reader = judge()
    images, whole = finite(images)
    right = (reader.predict(images) == wanted) & whole
    real, other = (reader.features(half) for half in real_halves(len(images), shift))
    scalars = {
        "digit_accuracy": float(right.mean()),
        "judge_accuracy": reader.accuracy(shift),
        "frechet_distance": frechet_distance(reader.features(images), real) if whole.all() else float("nan"),
        "frechet_floor": frechet_distance(other, real),
    }
    return scalars, right


def sample_grid(images: np.ndarray, captions: list[str], right: np.ndarray) -> np.ndarray:
    """Four rows of the ten digits with what was asked for above them, red where the judge reads another digit."""
    rounds = len(images) // 10
    # Each row and column takes another phrasing.
    shown = [digit + 10 * ((3 * row + digit) % rounds) for row in range(ROWS) for digit in range(10)]
    colors = ["black" if right[i] else "red" for i in shown]
    return caption_grid(images[shown], [captions[i] for i in shown], COLUMNS, colors=colors)
