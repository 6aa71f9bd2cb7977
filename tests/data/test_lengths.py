"""A length that no machine has room for is refused in one sentence, before a row is made."""

import pytest

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
