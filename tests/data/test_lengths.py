"""A length that no machine has room for is refused in one sentence, before a row is made; cut texts are told."""

import numpy as np
import pytest

from src.data import told_once
from src.data.example import BadRow, Example
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.class_prompt import ClassPrompt
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.packed import Packed
from src.data.templates.picture_chat import PictureChat
from src.data.templates.text import Text
from src.data.words import LONGEST
from tests.helpers.fields import table

EXAMPLE = [{"text": "a", "caption": "a", "turns": ["a", "b"]}]


@pytest.mark.parametrize("length", [10**9, LONGEST + 1])
@pytest.mark.parametrize(
    "template",
    [
        Chat,
        Text,
        CaptionToImage,
        ImageToCaption,
        ClassPrompt,
        Packed,
        lambda length: CaptionToImage(row_length=length + 100),
        lambda length: PictureChat(length, 8, vision="image"),
        lambda length: PictureChat(8, length, vision="image"),
        lambda length: Packed(64, prompt_length=length),
    ],
)
def test_lengths_above_the_bound_are_refused(template, length):
    with pytest.raises(ValueError, match=r"of 1,0[0-9,]+ tokens is not possible: give a length of 1,048,576 at most$"):
        template(length).bind(table(), EXAMPLE)


def test_the_bound_itself_is_possible():
    for template in (Chat(LONGEST), Text(LONGEST), Packed(LONGEST)):
        template.bind(table(), EXAMPLE)


@pytest.mark.parametrize(
    ("template", "what", "room"),
    [
        (Chat, "chat", 32),
        (Text, "text", 30),
        (ImageToCaption, "text", 30),
        (CaptionToImage, "text", 30),
        (lambda length, **options: PictureChat(8, length, vision="image", **options), "text behind the image", 32),
    ],
)
def test_the_first_text_that_is_cut_is_told(caplog, monkeypatch, template, what, room):
    monkeypatch.setattr(told_once, "_told", set())
    image, long = np.zeros((8, 8, 1), np.uint8), "x" * 40
    texts = [{"text": text, "caption": text, "turns": ["a", text]} for text in ("short", long, long)]
    source = [Example({"image": image} | text, f"row {n}") for n, text in enumerate(texts)]
    if what in ("text behind the image", "chat"):  # a chat that has an image says so, too
        source = [Example({"turns": e["turns"]}, e.where) for e in source]
    task = SourceTask("t", source, template(32), table())
    for row in range(3):
        task.read("train", row)
    (told,) = [r.getMessage() for r in caplog.records]
    assert told.startswith(f"row 1: the {what} is cut to {room} tokens: give a larger length, or too_long='skip'")
    task = SourceTask("t", source, template(32, too_long="skip"), table())
    task.read("train", 0)
    with pytest.raises(BadRow):
        task.read("train", 1)
    assert len(caplog.records) == 1
