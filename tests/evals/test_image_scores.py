"""Scores of drawn images as an evaluator, with a pipeline that draws real digits."""

import contextlib
import pathlib
import types

import numpy as np
import pytest

from src.data.sources import digits
from src.evals.frechet import frechet_distance
from src.evals.image_scores import ImageScoresEvaluator
from src.evals.scores.statistics import Statistics, write_statistics
from tests.helpers.tasks import digit_tasks, fields

TASKS = digit_tasks()
OPTIONS = {"draw": "label_to_image", "network": "pixels", "count": 40, "rows": 16}


class Draws:
    """Real training digits of the classes that are asked for; `spoilt`: one has a value that is not finite."""

    fields, decoders = fields(), {"image": types.SimpleNamespace(steps=7)}
    guidance = types.SimpleNamespace(scale=1.5)

    def __init__(self, spoilt=False):
        self.spoilt, self.seeds, self.given = spoilt, [], []

    def values(self, task, given, seed):
        self.seeds.append(seed)
        self.given += given
        real, random = digits.load("train"), np.random.default_rng(seed)
        rows = [random.choice(np.flatnonzero(real.labels == example["label"])) for example in given]
        images = real.values[rows].copy()
        images[-1, 0, 0, 0] = np.nan if self.spoilt else images[-1, 0, 0, 0]
        return {"image": images}


def drawn(pipeline):
    """What a pipeline drew, as the scores see it."""
    seeds = zip((0, 16, 32), pipeline.seeds, strict=True)
    blocks = [Draws().values("", pipeline.given[i : i + 16], seed)["image"] for i, seed in seeds]
    return np.rint((np.concatenate(blocks) + 1) * 127.5).astype(np.uint8)


def test_the_scores_are_those_of_the_drawings_against_the_reference(tmp_path):
    pipeline = Draws()
    metrics = ("fid", "kid", "precision_recall")
    result = ImageScoresEvaluator(TASKS, **OPTIONS, metrics=metrics, reference="test", prefix="px_")(pipeline, 3)
    assert [example["label"] for example in pipeline.given] == [number % 10 for number in range(40)]
    assert len(set(pipeline.seeds)) == 3, "each block has noise of its own"
    held = np.rint((digits.load("test").values + 1) * 127.5)
    flat = lambda images: images.repeat(3, axis=3).reshape(len(images), -1) / 255
    expected = frechet_distance(flat(drawn(pipeline)), flat(held))
    assert result.scalars["px_fid"] == pytest.approx(expected, rel=1e-5)
    assert set(result.scalars) == {"px_fid", "px_kid", "px_kid_std", "px_precision", "px_recall"}
    assert result.how["reference"] == {"source": "Digits", "split": "test", "count": 360}
    assert result.how["count"] == 40 and result.how["guidance"] == 1.5 and result.how["steps"] == 7
    assert any("fewer than 2,048" in told for told in result.how["warnings"])
    assert result.images["px_samples"].ndim == 3

    moments = Statistics(flat(held).mean(0), np.cov(flat(held), rowvar=False))
    write_statistics(tmp_path / "held.npz", moments)
    evaluator = ImageScoresEvaluator(TASKS, **OPTIONS, reference=f"{tmp_path}/held.npz")
    evaluator.check(Draws.fields)
    again = evaluator(Draws(), 3)
    assert again.scalars["fid"] == pytest.approx(expected, rel=1e-5)
    assert len(again.how["reference"]["sha256"]) == 64


def test_drawings_that_are_not_finite_do_not_end_a_run():
    result = ImageScoresEvaluator(TASKS, **OPTIONS, metrics=("fid", "kid"), reference="test")(Draws(spoilt=True), 0)
    assert set(result.scalars) == {"fid", "kid", "kid_std"} and np.isnan(list(result.scalars.values())).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"draw": "paint"}, "draw='paint' is no task of the config, which has caption_to_image"),
        ({"metrics": ("fib",)}, "metrics has 'fib'; give some of fid, sfid"),
        ({"metrics": ("is",)}, "is needs logits features, which the network 'pixels' does not have"),
        ({"reference": ""}, "fid compares with real images: give reference"),
        ({"network": "vgg"}, "network='vgg' is unknown; give one of inception, dinov2, clip, pixels"),
        ({"count": 1}, "count=1.*give 2 images and more"),
        ({"count": 3, "metrics": ("precision_recall",)}, "count=3 is too small for precision_recall"),
    ],
)
def test_options_that_cannot_be_are_refused_when_the_system_is_built(options, told):
    with pytest.raises(ValueError, match=told):
        ImageScoresEvaluator(TASKS, **OPTIONS | {"reference": "test"} | options)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"network": "inception"}, "^give weights=pt_inception"),
        ({"network": "inception", "weights": "none.pth"}, "none.pth does not exist: download pt_inception"),
        ({"network": "dinov2", "weights": "{g}/dinov2"}, ""),
        ({"network": "dinov2", "weights": "{g}/dinov2", "reference": "{f}/other.npz"}, r"of another network: mu \[2\]"),
        ({"network": "dinov2", "weights": "{g}/clip_pair"}, "of model_type 'clip', and read are dinov2"),
        ({"reference": "none.npz"}, "does not exist"),
        ({"reference": "{f}/cut.npz"}, "is damaged|cannot be read"),
        ({"reference": "{f}/other.npz"}, r"of another network: mu \[2\]"),
        (
            {"reference": "{f}/moments.npz", "metrics": ("kid",)},
            "kid needs real images, and reference has moments only",
        ),
        ({"reference": "{f}/large.npz"}, "are 9 x 8 pixels, and the drawn ones 8 x 8: cut them alike"),
        ({"draw": "image_to_caption"}, "makes text and not an image: name another task"),
    ],
)
def test_files_are_looked_at_before_anything_is_drawn(options, told, tmp_path):
    write_statistics(tmp_path / "other.npz", Statistics(np.zeros(2), np.eye(2)))
    write_statistics(tmp_path / "moments.npz", Statistics(np.zeros(192), np.eye(192)))
    np.savez(tmp_path / "large.npz", np.zeros((2, 9, 8, 3), np.uint8))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "large.npz").read_bytes()[:-30])
    golden = pathlib.Path(__file__).parents[1] / "golden"
    options = {n: v.format(f=tmp_path, g=golden) if isinstance(v, str) else v for n, v in options.items()}
    evaluator = ImageScoresEvaluator(TASKS, **OPTIONS | {"reference": "test"} | options)
    with pytest.raises((ValueError, FileNotFoundError), match=told) if told else contextlib.nullcontext():
        evaluator.check(Draws.fields)
