"""No template feeds a row in which everything that should be learned was cut off: it is a bad row, or has a target."""

import json

import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data import told_once
from src.data.example import BadRow, Example
from src.data.sources.llava import Llava
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.packed import Packed
from src.data.templates.picture_chat import PictureChat
from src.data.templates.text import Text
from src.interfaces import FieldSpec
from tests.helpers.fields import field, table
from tests.helpers.rows import build

CODEC, LONG = Bytes(), "q" * 300
IMAGE = np.zeros((8, 8, 1), np.uint8)
CHAT = {"turns": [LONG, "a dog", "q", "a cat"]}
PICTURE = {"image": np.zeros((8, 8, 3), np.uint8), "turns": [f"<image>{LONG}", "a dog"]}
CUT = "no place for an answer|nothing of it that has room in a row is a target"


class Eye:
    where, shape, takes, spec = "frozen", (4, 3), (8, 8, 3), FieldSpec((2, 2), features=3)

    def preprocess(self, pixels):
        return np.zeros(self.takes, np.float32)


def made(template, *examples):
    return SourceTask("t", [*examples], template, table(CODEC, vision=field("vision", Eye())))


@pytest.mark.parametrize("room", [3, 16, 64, 300])
@pytest.mark.parametrize(
    ("template", "example"),
    [
        (lambda n: Chat(n), CHAT),
        (lambda n: Chat(n, headers=True), CHAT),
        (lambda n: Chat(n, turns="last", question=0), {"turns": ["q", "a", LONG, "a dog"]}),
        (lambda n: Packed(n), CHAT),
        (lambda n: Packed(n), {"parts": [{"text": LONG, "loss": False}, {"text": "a dog"}]}),
        (lambda n: PictureChat(8, n), PICTURE),
        (lambda n: PictureChat(8, n), CHAT),
        (lambda n: PictureChat(8, n, marks=False), PICTURE),
    ],
)
def test_a_row_whose_targets_are_all_cut_off_is_a_bad_one(template, example, room):
    task = made(template(room), example)
    for row in range(task.rows("train")):
        with pytest.raises(BadRow, match=CUT):
            task.read("train", row)
    task = made(template(340), example)  # and with room for some of an answer it has targets
    assert any(tokens.target.any() for tokens in build(task, "train", [0]).tokens.values())


@pytest.mark.parametrize("room", [3, 4, 64])
@pytest.mark.parametrize("text", [LONG, "a", "\u200b"])
def test_other_templates_always_have_a_target(text, room):
    values = {"text": text, "caption": text, "image": IMAGE}
    for template in (Text(room), ImageToCaption(room), CaptionToImage(room, text_loss=True), CaptionToImage(room)):
        task = made(template, values)
        for uniforms in (None, np.zeros((1, task.draws))):  # with all words dropped, too
            batch = build(task, "train", [0], uniforms)
            assert any((t.target & t.valid)[0].any() for t in batch.tokens.values()), type(template).__name__


def test_the_published_loss_on_questions_has_targets_wherever_the_row_ends(tmp_path):
    said = [{"from": who, "value": text} for who, text in zip(("human", "gpt"), CHAT["turns"], strict=False)]
    (tmp_path / "l.json").write_text(json.dumps([{"conversations": said}]))
    fields = table(CODEC, vision=field("vision", Eye()))
    task = SourceTask("t", Llava(tmp_path / "l.json", tmp_path), PictureChat(8, 16, train_on_source=True), fields)
    assert build(task, "train", [0]).tokens["text.rest"].target[0].all()


@pytest.mark.parametrize("published", [False, True])
def test_an_answer_before_the_image_is_told_where_it_is_no_target(caplog, monkeypatch, published):
    monkeypatch.setattr(told_once, "_told", set())
    seen = Example({"image": PICTURE["image"], "turns": ["q", "a dog", "<image>", "a cat"]}, "row 1")
    tokens = build(made(PictureChat(32, 64, train_on_source=published), PICTURE, seen), "train", [1]).tokens
    assert tokens["text.head"].target.any() == published and tokens["text.rest"].target.any()
    told = "row 1: the answers before the image are no targets, which those behind it are (told once)"
    assert [r.getMessage() for r in caplog.records] == [told] * (not published)


def test_chats_that_are_cut_to_a_row_are_a_warning(caplog):
    caplog.set_level("INFO")
    for turns, level in ((["q", "a"], "INFO"), (["q", "a" * 90], "WARNING"), (["q" * 90, "a"], "WARNING")):
        caplog.clear()
        made(Packed(64), {"turns": turns}).rows("train")
        assert [(r.levelname, "1 are cut" in r.getMessage(), "1 cannot" in r.getMessage()) for r in caplog.records] == [
            (level, len(turns[1]) > 1, len(turns[0]) > 1)
        ]
