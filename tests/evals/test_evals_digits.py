"""Evaluators of single digits, with a predictor that is right for a chosen share of its answers."""

import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data import digits
from src.data.digits import CaptionToImage, ImageToCaption, NumberSentences
from src.data.labels import LabelToImage
from src.data.rows import shift_images, shifts
from src.evals.digits import Digits
from src.evals.drawing import real_halves, score_drawings, wanted_digits
from src.evals.judge import judge
from src.evals.labels import Labels


@pytest.fixture(scope="module")
def tasks():
    codec = Bytes()
    return {
        "caption_to_image": CaptionToImage(codec),
        "image_to_caption": ImageToCaption(codec),
        "number_sentences": NumberSentences(codec),
        "label_to_image": LabelToImage(),
    }


class Fake:
    """Answers row i rightly unless `wrong(i)`: then with the next digit."""

    def __init__(self, tasks, wrong=lambda i: False, images="train"):
        self.wrong, self.images, self.asked = wrong, images, []
        self.digit_of = dict(tasks["caption_to_image"].prompts("test"))
        self.answers = dict(tasks["number_sentences"].prompts("train") + tasks["number_sentences"].prompts("test"))

    def draw(self, task, *, words=None, labels=None, seed):
        assert (words is None) == (task == "label_to_image") and (labels is None) == (words is not None)
        self.asked += words or labels
        wanted = [self.digit_of[w] for w in words] if words else labels
        rng, real = np.random.default_rng(seed), digits.load(self.images)
        drawn = [(digit + self.wrong(i)) % 10 for i, digit in enumerate(wanted)]
        rows = [rng.choice(np.flatnonzero(real.labels == digit)) for digit in drawn]
        return shift_images(real.values[rows], shifts(rng.random((len(rows), 2)), 1), digits.BACKGROUND)

    def write(self, task, *, words=None, images=None, seed):
        if images is not None:
            assert task == "image_to_caption" and words is None
            real = digits.load("test")
            labels = {image.tobytes(): label for image, label in zip(*real, strict=True)}
            found = [labels[image.tobytes()] for image in images]
            return [f" {digits.caption((digit + self.wrong(i)) % 10)}" for i, digit in enumerate(found)]
        return [f"{self.answers[w]}  " if not self.wrong(i) else f"{self.answers[w]} one" for i, w in enumerate(words)]


def test_judge_reads_what_it_has_never_seen():
    reader = judge()
    assert reader is judge()
    assert reader.accuracy() > 0.985 and reader.accuracy(1) > 0.98
    held = digits.load("test")
    assert np.mean(reader.predict(held.values) == held.labels) == reader.accuracy()
    assert np.allclose(reader.features(held.values[:3] * 1.0), reader.features(np.clip(held.values[:3], -1, 1)))
    assert reader.features(held.values[:3]).shape == (3, 45)
    loud = (held.values[:20] > -1) * 8.0 - 4  # values outside of [-1, 1] are clipped
    assert (reader.features(loud) == reader.features(np.sign(loud))).all()
    with pytest.raises(ValueError, match=r"\[n, 8, 8, 1\], not \[2, 16, 16, 1\]"):
        reader.predict(np.zeros((2, 16, 16, 1)))


def test_halves_are_disjoint_balanced_and_real():
    images = digits.load("train")
    label_of = {image.tobytes(): label for image, label in zip(*images, strict=True)}
    halves = real_halves(690, 0)
    seen = [[image.tobytes() for image in half] for half in halves]
    assert len(set(seen[0]) | set(seen[1])) == 1380
    for half in seen:
        assert np.bincount([label_of[image] for image in half]).tolist() == [69] * 10
    again, moved = real_halves(690, 0)[0], real_halves(690, 1)[0]
    assert (again == halves[0]).all() and np.mean((moved == again).all(axis=(1, 2, 3))) < 0.3


def test_perfect_predictions(tasks):
    fake = Fake(tasks, images="test")
    result = Digits(tasks)(fake, seed=3)
    scores = result.scalars
    assert scores["digit_accuracy"] > 0.97 and scores["digit_accuracy"] == pytest.approx(
        scores["judge_accuracy"], abs=0.015
    )
    assert scores["caption_accuracy"] == scores["text_accuracy"] == scores["text_accuracy_train"] == 1
    # Unseen real images, though drawn with repetition from 360, are near the floor; what is not real is far from it.
    assert 0 < scores["frechet_floor"] < scores["frechet_distance"] < 3 * scores["frechet_floor"]
    assert len(fake.asked) == 690 and set(fake.asked) == set(fake.digit_of)  # all phrasings
    assert set(result.images) == {"samples", "captions"} and "wrong" not in result.texts["completions"]
    assert not (result.images["captions"] == [255, 0, 0]).all(axis=2).any()
    labels = Labels(tasks)(Fake(tasks), seed=3)
    assert labels.scalars["digit_accuracy"] > 0.99
    assert labels.scalars["frechet_distance"] < 1.5 * labels.scalars["frechet_floor"]


@pytest.mark.parametrize("wrong, right", [(lambda i: i // 10 % 2, 0.5), (lambda i: 1, 0.0)])
def test_half_wrong_and_wrong_predictions(tasks, wrong, right):
    result = Digits(tasks, images=200, sentences=80)(Fake(tasks, wrong), seed=0)
    scores = result.scalars
    assert scores["digit_accuracy"] == pytest.approx(right, abs=0.02)
    for name in ("caption_accuracy", "text_accuracy", "text_accuracy_train"):
        assert scores[name] == pytest.approx(right, abs=0.02), name
    assert "wrong, it is" in result.texts["completions"]
    assert (result.images["captions"] == [255, 0, 0]).all(axis=2).any()
    # All digits are there, though in wrong places: the Fréchet distance does not see it, the accuracy does.
    assert scores["frechet_distance"] < 2 * scores["frechet_floor"]
    labels = Labels(tasks, images=200)(Fake(tasks, wrong), seed=0)
    assert labels.scalars["digit_accuracy"] == pytest.approx(right, abs=0.02)


def test_chance_noise_and_missing_digits():
    rng, wanted = np.random.default_rng(0), wanted_digits(690)
    real = digits.load("test")
    scores, _ = score_drawings(real.values[rng.integers(0, 360, 690)], wanted, 1)
    assert 0.06 < scores["digit_accuracy"] < 0.14
    scores, _ = score_drawings(rng.standard_normal((690, 8, 8, 1)), wanted, 1)
    assert 0.05 < scores["digit_accuracy"] < 0.2 and scores["frechet_distance"] > 50 * scores["frechet_floor"]
    half = real_halves(690, 1)[1]
    for worse in (np.resize(half[: 5 * 69], half.shape), half + 0.3 * rng.standard_normal(half.shape)):
        assert score_drawings(worse, wanted, 1)[0]["frechet_distance"] > 3 * scores["frechet_floor"]


def test_images_that_are_not_finite_are_wrong():
    real, wanted = digits.load("train"), wanted_digits(20)
    images = real.values[[np.flatnonzero(real.labels == digit)[0] for digit in wanted]].copy()
    images[:5, 0, 0] = np.nan
    scores, right = score_drawings(images, wanted, 1)
    assert scores["digit_accuracy"] == 0.75 and right.tolist() == [False] * 5 + [True] * 15
    assert np.isnan(scores["frechet_distance"]) and scores["frechet_floor"] > 0


def test_parts_can_be_left_out_and_mistakes_are_told(tasks):
    only = Digits({"other": tasks["number_sentences"]}, draw=None, caption=None, complete="other", sentences=10)

    class Wrong:
        def write(self, task, *, words, seed):
            assert task == "other" and len(words) == 10
            return ["x"] * 10

    assert only(Wrong(), 0).scalars == {"text_accuracy": 0, "text_accuracy_train": 0}
    missing = "evaluator Digits has caption='image_to_caption', but the config has no such task, only caption_to_image"
    with pytest.raises(ValueError, match=missing):
        Digits({"caption_to_image": tasks["caption_to_image"]})
    with pytest.raises(ValueError, match="draw='number_sentences', which is a NumberSentences task: set draw"):
        Digits(tasks, draw="number_sentences")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        Digits(tasks, draw=None, caption=None, complete=None)
    with pytest.raises(ValueError, match="images=700: give a multiple of 10 from 20 to 690"):
        Labels(tasks, images=700)
    with pytest.raises(ValueError, match="captions=0"):
        Digits(tasks, captions=0)
    with pytest.raises(ValueError, match="LabelToImage task"):
        Labels(tasks, draw="caption_to_image")
