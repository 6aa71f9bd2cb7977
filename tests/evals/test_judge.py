"""The judge must not have seen what it is measured on."""

import pytest

from src.data.sources import digits
from src.evals.judge import Judge


def test_the_judge_learns_from_training_images_alone(monkeypatch):
    train, asked = digits.load("train"), []

    def load(split):
        asked.append(split)
        if split != "train":
            raise AssertionError("the held-out images were asked for")
        return type(train)(train.values[:150], train.labels[:150])

    monkeypatch.setattr(digits, "load", load)
    reader = Judge()
    assert asked == ["train"]
    with pytest.raises(AssertionError, match="held-out"):  # so the spy is where the judge looks
        reader.accuracy()
