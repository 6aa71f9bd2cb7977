"""Canvases: the grammar is exact, and the picture is what the caption says."""

import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data.pipeline.stream import ordered
from src.data.sources import canvas, digits
from src.data.sources.canvas import Canvas
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.image_to_caption import ImageToCaption
from tests.helpers.fields import table
from tests.helpers.rows import build, rows_of, words

CODEC = Bytes()


def tasks(size=16, **options):
    """Two digits at most, so that there are few captions."""
    fields, options = table(CODEC, (size, size, 1), 4), {"size": size, "most": 2, "shift": 0} | options
    draw = SourceTask("draw", Canvas(**options), CaptionToImage(), fields)
    return draw, SourceTask("say", Canvas(**options), ImageToCaption(), fields)


def test_every_canvas_has_its_own_caption_and_parsing_inverts_it():
    labels = canvas.labels()
    assert len(labels) == 11**4 - 1
    captions = [canvas.caption(label) for label in labels]
    assert len(set(captions)) == len(captions)
    assert all(canvas.parse_caption(c) == canvas.cells(label) for c, label in zip(captions, labels, strict=True))


@pytest.mark.parametrize(
    ("label", "text"),
    [
        ([7, -1, -1, -1], "seven top left"),
        ([-1, -1, 7, 2], "seven left of two bottom"),
        ([-1, 7, -1, 2], "seven above two right"),
        ([7, -1, -1, 2], "seven left above two right"),
        ([7, 2, -1, 3], "seven left of two above three right"),
        ([7, 2, 3, 1], "seven left of two above three left of one"),
    ],
)
def test_captions_read_as_documented(label, text):
    assert canvas.caption(np.array(label)) == text
    assert canvas.parse_caption(f"  {text} ") == canvas.cells(np.array(label))


@pytest.mark.parametrize("text", ["", "seven", "ten top left", "seven top left two", "seven left of two above"])
def test_what_is_no_caption_is_none(text):
    assert canvas.parse_caption(text) is None


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_picture_shows_digits_of_the_split_where_the_caption_says(split):
    """Every cell is either background or an image of the split with the label's digit; found by exact search."""
    draw, say = tasks()
    index = np.arange(60)
    uniforms = np.random.default_rng(0).random((60, draw.draws)) if split == "train" else None
    drawn = None if uniforms is None else uniforms[:, 2:]  # the first two are the template's
    values, labels = draw.source.canvases(split, index, drawn)
    images = digits.load(split)
    known = {(image.tobytes(), int(n)) for image, n in zip(images.values, images.labels, strict=True)}
    batch, spoken = build(draw, split, index, uniforms).tokens, build(say, split, index, drawn).tokens
    used = np.zeros(4, int)
    for row, label in enumerate(labels):
        for cell, digit in enumerate(label):
            top, left = 8 * (cell // 2), 8 * (cell % 2)
            part = np.ascontiguousarray(values[row, top : top + 8, left : left + 8])
            assert (part == -1).all() if digit == canvas.EMPTY else (part.tobytes(), int(digit)) in known
        used += label != canvas.EMPTY
        text = canvas.caption(label)
        assert words(CODEC, spoken["text.caption"], row) == f"</i>[{text}</s>]"
        dropped = uniforms is not None and uniforms[row, 1] < 0.1
        assert words(CODEC, batch["text.prompt"], row) == ("<s><i>" if dropped else f"<s>{text}<i>")
    assert (used > 5).all()  # all four cells
    np.testing.assert_array_equal(batch["image"].value, values)
    np.testing.assert_array_equal(spoken["image"].value, values)
    assert set((labels != canvas.EMPTY).sum(1)) == {1, 2}


def test_test_canvases_are_fixed_and_shared_by_both_tasks():
    draw, say = tasks()
    drawn, spoken = rows_of(draw, "test").tokens, rows_of(say, "test").tokens
    assert len(drawn["image"].value) == 360
    np.testing.assert_array_equal(drawn["image"].value, spoken["image"].value)
    shaky = tasks(shift=1)[1]  # shifts are for training only
    batch = next(ordered(shaky, "test", 8))
    np.testing.assert_array_equal(batch.tokens["image"].value, spoken["image"].value[:8])


def test_larger_canvases_and_shifts_stay_inside_their_cells():
    task = tasks(size=24, most=1, shift=1)[1]
    assert task.layout.segment("image").length == 36
    uniforms = np.random.default_rng(1).random((200, task.draws))
    values, labels = task.source.canvases("train", np.arange(200), uniforms)
    inked = (values[..., 0].reshape(200, 2, 12, 2, 12) > -1).any((2, 4)).reshape(200, 4)
    np.testing.assert_array_equal(inked, labels != canvas.EMPTY)
    np.testing.assert_array_equal(build(task, "train", [7], uniforms[7:8]).tokens["image"].value, values[7:8])
    with pytest.raises(ValueError, match="size 12"):
        Canvas(size=12)


def test_tokenizer_text_covers_every_word_of_the_grammar():
    found = {w for label in canvas.labels(3)[::7] for w in canvas.caption(label).split()}
    assert found <= {w for text in canvas.texts() for w in text.split()}
