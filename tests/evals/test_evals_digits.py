"""Evaluators of single digits, with a pipeline that is right for a chosen share of its answers."""

import numpy as np
import pytest

from src.data.images import shift_images, shifts
from src.data.sources import digits, numbers
from src.evals.digits import DigitsEvaluator
from src.evals.drawing import mixed_patches, pixel_distance, real_halves, score_drawings, shifted, wanted_digits
from src.evals.judge import judge
from src.evals.labels import LabelsEvaluator
from tests.helpers.tasks import digit_tasks


@pytest.fixture(scope="module")
def tasks():
    return digit_tasks()


class Fake:
    """Answers row i rightly unless `wrong(i)`: then with the next digit."""

    def __init__(self, wrong=lambda i: False, images="train"):
        self.wrong, self.images, self.asked = wrong, images, []
        self.digit_of = {phrase: digit for digit in range(10) for phrase in numbers.phrases(digit)}
        self.answers = {s.prompt: s.answer for split in ("train", "test") for s in numbers.sentences(split)}

    def values(self, task, given, seed):
        key = "label" if task == "label_to_image" else "caption"
        assert all(set(example) == {key} for example in given)
        asked = [example[key] for example in given]
        self.asked += asked
        wanted = asked if key == "label" else [self.digit_of[w] for w in asked]
        rng, real = np.random.default_rng(seed), digits.load(self.images)
        drawn = [(digit + self.wrong(i)) % 10 for i, digit in enumerate(wanted)]
        rows = [rng.choice(np.flatnonzero(real.labels == digit)) for digit in drawn]
        return {"image": shift_images(real.values[rows], shifts(rng.random((len(rows), 2)), 1), digits.BACKGROUND)}

    def __call__(self, task, given, seed):
        if task == "image_to_caption":
            assert all(set(example) == {"image"} for example in given)
            real = digits.load("test")
            labels = {image.tobytes(): label for image, label in zip(*real, strict=True)}
            found = [labels[example["image"].tobytes()] for example in given]
            said = [f" {digits.caption(int(digit + self.wrong(i)) % 10)}" for i, digit in enumerate(found)]
            return [{"text.caption": text} for text in said]
        answers = [self.answers[example["prompt"]] for example in given]
        said = [f"{answer}  " if not self.wrong(i) else f"{answer} one" for i, answer in enumerate(answers)]
        return [{"text.sentence": text} for text in said]


class Modes(Fake):
    """Makes another share of errors with each decoder, and counts its passes."""

    def counted(self, task, given, seed, decoders):
        self.wrong = decoders["image"]
        return self.values(task, given, seed), np.full(len(given), 7)


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
    fake = Fake(images="test")
    result = DigitsEvaluator(tasks)(fake, seed=3)
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
    labels = LabelsEvaluator(tasks)(Fake(), seed=3)
    assert labels.scalars["digit_accuracy"] > 0.99
    assert labels.scalars["frechet_distance"] < 1.5 * labels.scalars["frechet_floor"]


@pytest.mark.parametrize("wrong, right", [(lambda i: i // 10 % 2, 0.5), (lambda i: 1, 0.0)])
def test_half_wrong_and_wrong_predictions(tasks, wrong, right):
    result = DigitsEvaluator(tasks, images=200, sentences=80)(Fake(wrong), seed=0)
    scores = result.scalars
    assert scores["digit_accuracy"] == pytest.approx(right, abs=0.02)
    for name in ("caption_accuracy", "text_accuracy", "text_accuracy_train"):
        assert scores[name] == pytest.approx(right, abs=0.02), name
    assert "wrong, it is" in result.texts["completions"]
    assert (result.images["captions"] == [255, 0, 0]).all(axis=2).any()
    # All digits are there, though in wrong places: the Fréchet distance does not see it, the accuracy does.
    assert scores["frechet_distance"] < 2 * scores["frechet_floor"]
    labels = LabelsEvaluator(tasks, images=200)(Fake(wrong), seed=0)
    assert labels.scalars["digit_accuracy"] == pytest.approx(right, abs=0.02)


def test_further_decoders_of_a_checkpoint_are_scored_by_name(tasks):
    modes = {"good": lambda i: False, "half": lambda i: i % 20 < 10}
    found = LabelsEvaluator(tasks, images=100, modes=modes)(Modes(lambda i: i < 10), seed=0)
    one = found.scalars
    assert one["good/digit_accuracy"] > 0.95 and abs(one["half/digit_accuracy"] - 0.5) < 0.05
    assert one["digit_accuracy"] > 0.85 and one["good/calls"] == one["half/calls"] == 7
    assert one["half/fdpx"] != one["good/fdpx"] and not any("floor" in name for name in one if "/" in name)
    assert found.images["modes"].shape[0] < found.images["samples"].shape[0], "a row of each mode"


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
    assert np.isnan(scores["fdpx"]) and np.isnan(scores["fdpx_at_held_out"]) and scores["fdpx_floor_held_out"] > 0


def test_the_distance_in_pixels_sees_whether_patches_belong_together():
    """Floors as measured: held-out digits 0.102, patches independent given the class 0.407 of 500."""
    held, mixed = shifted(digits.load("test").values, 0), mixed_patches(500, 0)
    assert (held == digits.load("test").values).all()
    assert pixel_distance(held, 0) == pytest.approx(0.102, abs=0.01)
    assert pixel_distance(mixed, 0) == pytest.approx(0.407, abs=0.03)
    scores, _ = score_drawings(mixed, wanted_digits(500), 0)
    assert scores["fdpx"] == scores["fdpx_floor_patches"] and scores["digit_accuracy"] > 0.85
    real = digits.load("train").values
    for patch in mixed[:3, 2:4, 4:6, 0]:
        assert (real[:, 2:4, 4:6, 0] == patch).all(axis=(1, 2)).any()


def test_parts_can_be_left_out_and_mistakes_are_told(tasks):
    only = DigitsEvaluator({"other": tasks["number_sentences"]}, draw=None, captions=0, complete="other", sentences=10)

    class Wrong:
        def __call__(self, task, given, seed):
            assert task == "other" and len(given) == 10
            return [{"text.sentence": "x"}] * 10

    assert only(Wrong(), 0).scalars == {"text_accuracy": 0, "text_accuracy_train": 0}
    drawing = {"caption_to_image": tasks["caption_to_image"]}
    missing = "evaluator digits has caption='image_to_caption', but the config has no such task, only caption_to_image"
    with pytest.raises(ValueError, match=missing):
        DigitsEvaluator(drawing)
    assert set(DigitsEvaluator(drawing, images=20, captions=0, sentences=0)(Fake(), 0).images) == {"samples"}
    with pytest.raises(
        ValueError, match=r"draw='number_sentences', which makes text\.sentence for examples of Numbers"
    ):
        DigitsEvaluator(tasks, draw="number_sentences")
    with pytest.raises(ValueError, match="nothing to evaluate"):
        DigitsEvaluator(tasks, draw=None, caption=None, complete=None)
    with pytest.raises(ValueError, match="images=700"):
        LabelsEvaluator(tasks, images=700)
    with pytest.raises(ValueError, match="captions=-1"):
        DigitsEvaluator(tasks, captions=-1)
    with pytest.raises(ValueError, match=r"draw='caption_to_image'.*label of Digits"):
        LabelsEvaluator(tasks, draw="caption_to_image")


def test_as_many_drawings_as_held_out_images_are_compared_with_their_floor():
    """Of the same law, more images have a smaller distance."""
    images = mixed_patches(690, 0)
    scores = score_drawings(images, wanted_digits(690), 0)[0]
    assert scores["fdpx_at_held_out"] == pytest.approx(pixel_distance(images[:360], 0), rel=1e-6)
    assert scores["fdpx"] + 0.02 < scores["fdpx_at_held_out"]
