"""What the predictor hands to generation: the right rows with and without their condition, and fresh noise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.codecs.text import Bytes
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear
from src.data.digits import CaptionToImage
from src.data.labels import LabelToImage
from src.sampling import pipeline
from src.sampling.generate import ImageSampler
from src.sampling.guidance import Guidance
from src.sampling.steps.gaussian import Euler
from src.sequence.layout import Layout

ROWS = 2


@pytest.fixture
def draw(monkeypatch):
    """(task, scale, what is asked for) -> what generation was shown of each row: condition, null, noise `[n, K]`."""

    def shown(view):
        return view.labels[:, None] if "prompt" not in view.inputs else view.inputs["prompt"]

    def report(net, layout, view, key, *, generated, text, image, null):
        noise = jax.random.normal(key, (len(shown(view)), 1)) * net
        parts = [shown(view), jnp.full_like(shown(view), -1) if null is None else shown(null), noise]
        return {generated[0]: jnp.concatenate(parts, axis=1)}

    monkeypatch.setattr(pipeline, "generate", report)

    def run(task, scale, seed=0, **asked):
        same = lambda a: a
        image = ImageSampler(Gaussian(Linear(), "velocity"), Euler(), 1, Guidance(scale=scale), 4, 4)
        tasks = {"task": (task, Layout(task.segments), "image")}
        made = pipeline.Predictor(lambda params: params, tasks, same, same, None, image, None, rows=ROWS)
        rows = made.with_params(jnp.ones(())).draw("task", seed=seed, **asked)
        given, null = np.split(rows[:, :-1].astype(int), 2, axis=1)
        return given, null, rows[:, -1]

    return run


def test_words_are_guided_away_from_the_empty_prompt(draw):
    codec = Bytes()
    task, words = CaptionToImage(codec), ["a handwritten three", "7", "the digit one"]
    given, null, _ = draw(task, 2.0, words=words)
    for row, said in zip(given, words, strict=True):
        expected = [codec.bos, *codec.encode(said), codec.image_start]
        assert row.tolist() == expected + [codec.pad] * (given.shape[1] - len(expected))
    assert null.tolist() == [[codec.bos, codec.image_start] + [codec.pad] * (given.shape[1] - 2)] * 3
    assert (draw(task, 1.0, words=words)[1] == -1).all(), "without guidance, nothing runs twice"


def test_labels_are_guided_away_from_the_class_after_the_last(draw):
    given, null, _ = draw(LabelToImage(), 2.0, labels=[7, 0, 9])
    assert given.tolist() == [[7], [0], [9]] and null.tolist() == [[10]] * 3


def test_every_row_of_every_chunk_has_its_own_noise(draw):
    noise = draw(LabelToImage(), 1.0, labels=[3] * (2 * ROWS + 1))[2]
    assert len(set(noise.tolist())) == 2 * ROWS + 1
    np.testing.assert_array_equal(draw(LabelToImage(), 1.0, labels=[3] * (2 * ROWS))[2], noise[: 2 * ROWS])
    assert not set(draw(LabelToImage(), 1.0, seed=1, labels=[3])[2]) & set(noise)
