"""How well digits are drawn on demand: what the evaluators of words and of labels share.

Where the task shifts its training images at random, the real images of the Fréchet distance are shifted by the same
law. The training split gives two halves of 69 different images of each digit; generated samples are as many and as
balanced, so that `frechet_floor` is what a perfect model would get. (Features of held-out images are no farther from
those of a training half, at equal sample size, although the judge learned from both halves.)

What a judge's features see is a matter of the judge, so that the distance in pixels is told, too: a generator whose
`fdpx` is not below `fdpx_floor_patches` joins patches no better than by chance, and `fdpx_floor_held_out` is what real
images have: 360 of them, so that as many drawings are compared with it (`fdpx_at_held_out`).
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

from src.data.images import shift_images, shifts
from src.data.sources import digits
from src.evals.frechet import frechet_distance
from src.evals.grid import caption_grid
from src.evals.judge import finite, judge

IMAGES = 690  # 69 of each digit: half of the rarest digit's 138 training images
PATCH = 2  # pixels of a side of the patches that are mixed
COLUMNS, ROWS = 10, 4


def check_images(evaluator: str, count: int) -> None:
    """Raises ValueError unless `count` images can be balanced over the digits and fit into a real half."""
    if not isinstance(count, int) or count % 10 or not (count == 0 or 20 <= count <= IMAGES):
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
    fdpx              between the pixels, in [0, 1], of the drawings and of all real training images
    fdpx_floor_patches    the same of n images whose patches are independent given the digit
    fdpx_at_held_out      the same of as many drawings as there are held-out images (the distance falls with the number)
    fdpx_floor_held_out   the same of the held-out images; to be compared with `fdpx_at_held_out`

    An image with a value that is not finite is wrong, and the distances of the drawings are then NaN.
    Raises ValueError if the images are not 8 x 8 x 1.
    """
    reader, held_out = judge(), digits.load("test").values
    images, whole = finite(images)
    right = (reader.predict(images) == wanted) & whole
    real, other = (reader.features(half) for half in real_halves(len(images), shift))
    scalars = {
        "digit_accuracy": float(right.mean()),
        "judge_accuracy": reader.accuracy(shift),
        "frechet_distance": frechet_distance(reader.features(images), real) if whole.all() else float("nan"),
        "frechet_floor": frechet_distance(other, real),
        "fdpx": pixel_distance(images, shift) if whole.all() else float("nan"),
        "fdpx_at_held_out": pixel_distance(images[: len(held_out)], shift) if whole.all() else float("nan"),
        "fdpx_floor_held_out": pixel_distance(shifted(held_out, shift), shift),
        "fdpx_floor_patches": pixel_distance(mixed_patches(len(images), shift), shift),
    }
    return scalars, right


def pixel_distance(images: Float[np.ndarray, "n 8 8 1"], shift: int) -> float:
    """The Fréchet distance to the training images, in pixels in [0, 1] (values outside of [-1, 1] are clipped)."""
    flat = lambda values: (np.clip(values, -1, 1).reshape(len(values), -1) + 1) / 2
    return frechet_distance(flat(images), flat(shifted(digits.load("train").values, shift)))


def shifted(images: Float[np.ndarray, "n 8 8 1"], shift: int) -> Float[np.ndarray, "n 8 8 1"]:
    """Images that are moved at random, as those of the task are; always in the same way."""
    offsets = shifts(np.random.RandomState(1).random_sample((len(images), 2)), shift)
    return shift_images(images, offsets, digits.BACKGROUND)


def mixed_patches(count: int, shift: int, patch: int = PATCH) -> Float[np.ndarray, "n 8 8 1"]:
    """Images each of whose patches is that of another training image of the same digit: independent given the digit."""
    labels, rng = digits.load("train").labels, np.random.RandomState(2)
    values = shifted(digits.load("train").values, shift)
    images = np.empty((count, *values.shape[1:]), values.dtype)
    for digit in range(10):
        rows, of = np.flatnonzero(wanted_digits(count) == digit), np.flatnonzero(labels == digit)
        for top in range(0, values.shape[1], patch):
            for left in range(0, values.shape[2], patch):
                here = np.s_[top : top + patch, left : left + patch]
                images[(rows, *here)] = values[(rng.choice(of, len(rows)), *here)]
    return images


def sample_grid(images: np.ndarray, captions: list[str], right: np.ndarray) -> np.ndarray:
    """Four rows of the ten digits with what was asked for above them, red where the judge reads another digit."""
    rounds = len(images) // 10
    # Each row and column takes another phrasing.
    shown = [digit + 10 * ((3 * row + digit) % rounds) for row in range(ROWS) for digit in range(10)]
    colors = ["black" if right[i] else "red" for i in shown]
    return caption_grid(images[shown], [captions[i] for i in shown], COLUMNS, colors=colors)
