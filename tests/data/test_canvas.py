"""Canvases: the grammar is exact, and the picture is what the caption says."""

import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data import canvas, digits


@pytest.fixture(scope="module")
def tasks():
    """Two digits at most, so that the tables are small."""
    return [task(Bytes(), most=2, shift=0) for task in (canvas.CanvasCaptionToImage, canvas.CanvasImageToCaption)]


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
def test_the_picture_shows_digits_of_the_split_where_the_caption_says(tasks, split):
    """Every cell is either background or an image of the split with the label's digit; found by exact search."""
    draw, say = tasks
    index = np.arange(60)
    uniforms = np.random.default_rng(0).random((60, draw.draws)) if split == "train" else None
    values, numbers = draw.canvases(split, index, uniforms)
    images = digits.load(split)
    known = {(image.tobytes(), int(n)) for image, n in zip(images.values, images.labels, strict=True)}
    fields = draw.build(split, index, uniforms, {})
    spoken = say.build(split, index, uniforms, {})
    used = np.zeros(4, int)
    for row, number in enumerate(numbers):
        label = draw.labels[number]
        for cell, digit in enumerate(label):
            top, left = 8 * (cell // 2), 8 * (cell % 2)
            part = np.ascontiguousarray(values[row, top : top + 8, left : left + 8])
            assert (part == -1).all() if digit == canvas.EMPTY else (part.tobytes(), int(digit)) in known
        used += label != canvas.EMPTY
        caption = Bytes().decode(spoken["caption"].ids[row])
        assert canvas.parse_caption(caption) == canvas.cells(label)
        prompt = Bytes().decode(fields["prompt"].ids[row])
        dropped = uniforms is not None and uniforms[row, 17] < draw.drop
        assert prompt == ("" if dropped else caption)
    assert (used > 5).all()  # all four cells
    np.testing.assert_array_equal(fields["image"].values, spoken["image"].values)
    assert set((draw.labels[numbers] != canvas.EMPTY).sum(1)) == {1, 2}


def test_test_canvases_are_fixed_and_shared_by_both_tasks(tasks):
    draw, say = tasks
    spoken, drawn = say.prompts("test"), draw.prompts("test")
    assert len(spoken) == len(drawn) == 360
    for (image, label), (caption, other) in list(zip(spoken, drawn, strict=True))[::40]:
        assert label.tolist() == other.tolist() and canvas.parse_caption(caption) == canvas.cells(label)
        assert image.shape == (16, 16, 1)
    shaky = canvas.CanvasImageToCaption(Bytes(), most=2, shift=1)  # shifts are for training only
    batch = next(shaky.iterator("test", 8, seed=0))
    np.testing.assert_array_equal(batch["image"].values, np.stack([image for image, _ in spoken[:8]]))


def test_larger_canvases_and_shifts_stay_inside_their_cells():
    task = canvas.CanvasImageToCaption(Bytes(), size=24, most=1, shift=1)
    assert task.segments[1].length == 36
    uniforms = np.random.default_rng(1).random((200, task.draws))
    values, numbers = task.canvases("train", np.arange(200), uniforms)
    inked = (values[..., 0].reshape(200, 2, 12, 2, 12) > -1).any((2, 4)).reshape(200, 4)
    np.testing.assert_array_equal(inked, task.labels[numbers] != canvas.EMPTY)
    with pytest.raises(ValueError, match="size 12"):
        canvas.CanvasImageToCaption(Bytes(), size=12)


def test_tokenizer_text_covers_every_word_of_the_grammar():
    words = {w for label in canvas.labels(3)[::7] for w in canvas.caption(label).split()}
    assert words <= {w for text in canvas.texts() for w in text.split()}
