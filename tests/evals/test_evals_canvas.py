"""The canvas evaluator, with a pipeline that is right for a chosen share of its answers."""

import numpy as np
import pytest

from src.data.sources import canvas, digits
from src.evals.canvas import CanvasEvaluator, read_canvases
from tests.helpers.tasks import canvas_tasks


@pytest.fixture(scope="module")
def tasks():
    return canvas_tasks()


def paint(labels, side=8, seed=0):
    """Canvases [n, 2 side, 2 side, 1] of real held-out digits, each in the middle of its cell."""
    rng, real = np.random.default_rng(seed), digits.load("test")
    start = (side - 8) // 2
    images = np.full((len(labels), 2, side, 2, side, 1), -1.0, np.float32)
    for image, label in zip(images, labels, strict=True):
        for cell, digit in enumerate(label):
            if digit >= 0:
                pick = real.values[rng.choice(np.flatnonzero(real.labels == digit))]
                image[cell // 2, start : start + 8, cell % 2, start : start + 8] = pick
    return images.reshape(-1, 2 * side, 2 * side, 1)


class Fake:
    """Changes the labels of what is asked for by `damage(labels [n, 4])`, then answers rightly."""

    def __init__(self, damage=lambda labels: labels):
        self.damage = damage
        images, labels = canvas.Canvas().canvases("test", np.arange(canvas.TEST_ROWS), None)
        self.captions = {i.tobytes(): canvas.caption(label) for i, label in zip(images, labels, strict=True)}

    def damaged(self, captions):
        cells = [canvas.parse_caption(c) for c in captions]
        return self.damage(np.array([[c.get(name, -1) for name in canvas.CELLS] for c in cells]))

    def values(self, task, given, seed):
        assert task == "canvas_caption_to_image" and all(set(example) == {"caption"} for example in given)
        return {"image": paint(self.damaged([example["caption"] for example in given]), seed=seed)}

    def __call__(self, task, given, seed):
        assert task == "canvas_image_to_caption" and all(set(example) == {"image"} for example in given)
        said = self.damaged([self.captions[example["image"].tobytes()] for example in given])
        texts = [f"{canvas.caption(label)} " if (label >= 0).any() else "two of two" for label in said]
        return [{"text.caption": text} for text in texts]


def next_digit(labels):
    return np.where(labels >= 0, (labels + 1) % 10, -1)


def every_second(damage):
    return lambda labels: np.where(np.arange(len(labels))[:, None] % 2, damage(labels), labels)


def test_perfect_predictions(tasks):
    result = CanvasEvaluator(tasks)(Fake(), seed=0)
    scores = result.scalars
    assert scores["canvas_judge_accuracy"] > 0.93 and scores["judge_accuracy"] > 0.98
    assert scores["canvas_accuracy"] == pytest.approx(scores["canvas_judge_accuracy"], abs=0.04)
    assert scores["cell_accuracy"] > 0.985 and scores["digit_accuracy"] > 0.98
    assert scores["caption_accuracy"] == 1 and all(scores[f"caption_accuracy_{n}"] == 1 for n in (1, 2, 3, 4))
    assert set(result.images) == {"samples", "captions"} and "wrong" not in result.texts["captions"]


@pytest.mark.faults
def test_wrong_digits_and_half_of_them(tasks):
    all_wrong = CanvasEvaluator(tasks, canvases=200)(Fake(next_digit), seed=0).scalars
    empty = np.mean(canvas.Canvas().canvases("test", np.arange(canvas.TEST_ROWS), None)[1] == -1)
    assert all_wrong["canvas_accuracy"] < 0.02 and all_wrong["digit_accuracy"] < 0.03
    assert all_wrong["cell_accuracy"] == pytest.approx(empty, abs=0.05)  # the empty cells are still right
    assert all_wrong["caption_accuracy"] == 0
    half = CanvasEvaluator(tasks)(Fake(every_second(next_digit)), seed=0)
    assert half.scalars["canvas_accuracy"] == pytest.approx(0.5, abs=0.03)
    assert half.scalars["digit_accuracy"] == pytest.approx(0.5, abs=0.05)
    assert half.scalars["caption_accuracy"] == 0.5
    assert "wrong, it is" in half.texts["captions"] and (half.images["samples"] == [255, 0, 0]).all(axis=2).any()


@pytest.mark.faults
def test_right_digits_in_wrong_places_missing_or_too_many_are_wrong(tasks):
    def moved(labels):
        return labels[:, ::-1]

    def crowded(labels):
        return np.where(labels >= 0, labels, 3)

    def missing(labels):
        return np.where(np.arange(4) == (labels >= 0).argmax(1)[:, None], -1, labels)

    for damage in (moved, crowded, missing):
        scores = CanvasEvaluator(tasks, canvases=120, captions=120)(Fake(damage), seed=0).scalars
        for n in (1, 2, 3):
            # Two digits trade places unless they are alike.
            assert scores[f"canvas_accuracy_{n}"] < 0.07 and scores[f"caption_accuracy_{n}"] < 0.07, damage


def test_reading_canvases():
    labels = canvas.labels(4)[::150]
    for side in (8, 11):  # cells as large as a digit, and larger
        assert np.mean(read_canvases(paint(labels, side)) == labels) > 0.98
    rng = np.random.default_rng(0)
    blank = -1 + 0.15 * rng.standard_normal((9, 16, 16, 1))
    assert (read_canvases(blank) == -1).all()  # some noise is not yet ink
    source = canvas.Canvas(size=20, most=2)
    images, found = source.canvases("test", np.arange(300), rng.random((300, source.draws)))
    assert np.mean((read_canvases(images) == found).all(1)) > 0.95  # shifted digits in larger cells
    with pytest.raises(ValueError, match=r"not \[1, 8, 8, 1\]"):
        read_canvases(np.zeros((1, 8, 8, 1)))


def test_not_finite_repeats_and_mistakes(tasks):
    class Lost(Fake):
        def values(self, task, given, seed):
            assert len(given) == 400 and given[:40] == given[360:]  # more canvases than descriptions
            images = super().values(task, given, seed)["image"]
            images[::2, 0, 0] = np.inf
            return {"image": images}

    evaluator = CanvasEvaluator(tasks, caption=None, canvases=400)
    assert evaluator(Lost(), 0).scalars["canvas_accuracy"] == pytest.approx(0.5, abs=0.03)
    with pytest.raises(ValueError, match="evaluator canvas has draw='x', but the config has no such task"):
        CanvasEvaluator(tasks, draw="x")
    with pytest.raises(ValueError, match=r"draw='canvas_image_to_caption', which makes text\.caption"):
        CanvasEvaluator(tasks, draw="canvas_image_to_caption")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        CanvasEvaluator(tasks, draw=None, caption=None)
