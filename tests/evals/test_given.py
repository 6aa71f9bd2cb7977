"""What a person gives is one text or one image for each value, under names that a task has."""

import types

import pytest

from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.chat import Chat
from src.data.templates.picture_chat import PictureChat
from src.evals.given import choose_task, values_of


def task(caption, needs, answers):
    template = types.SimpleNamespace(caption=caption, needs=needs, answers=answers, optional=())
    return types.SimpleNamespace(template=template)


TASKS = {
    "draw": task("caption", ("caption", "image"), ("image",)),
    "read": task("caption", ("caption", "image"), ("caption",)),
}


def test_two_ways_to_give_the_same_text_are_refused():
    told = r"^the text of task draw is given twice, as prompt and as caption: give one of them$"
    for given, short in ((["caption=six"], {"prompt": "seven"}), (["caption=six", "prompt=seven"], {})):
        with pytest.raises(ValueError, match=told):
            choose_task(TASKS, values_of(given, **short), None)
    for name in (None, "draw"):
        assert choose_task(TASKS, {"caption": "six"}, name) == choose_task(TASKS, {"prompt": "six"}, name) == "draw"
    assert choose_task(TASKS, {"prompt": "the", "image": "a.png"}, None) == "read"


@pytest.mark.parametrize(("wrong", "meant"), [("captoin", "caption"), ("imge", "image"), ("promt", "prompt")])
def test_a_misspelt_name_gets_the_nearest_one_and_no_flag_that_was_not_given(wrong, meant):
    for tasks in (TASKS, {"draw": TASKS["draw"]}):
        with pytest.raises(ValueError, match="did you mean") as told:
            choose_task(tasks, {wrong: "three"}, None)
        assert str(told.value) == f"no task starts from --given {wrong}=…: did you mean {meant}?"


def test_what_is_like_no_name_is_told_as_it_was_given():
    with pytest.raises(ValueError, match=r"^no task starts from --given weather=…: draw from --prompt, read from "):
        choose_task(TASKS, {"weather": "fine"}, None)


def test_a_chat_starts_from_a_question_and_may_have_an_image():
    """The values that a prompt has are not those of an example, which has turns."""
    templates = {"draw": CaptionToImage(64), "chat": Chat(64), "picture_chat": PictureChat(24, 96)}
    tasks = {name: types.SimpleNamespace(template=template) for name, template in templates.items()}
    asked = {"prompt": "What is this?"}
    assert choose_task(tasks, asked, None) == "draw"
    assert [choose_task(tasks, asked, name) for name in tasks] == list(tasks)
    assert choose_task(tasks, asked | {"image": "a.png"}, None) == "picture_chat"
    with pytest.raises(ValueError, match=r"^task chat starts from --prompt, not --prompt and --image \(see --task\)$"):
        choose_task(tasks, asked | {"image": "a.png"}, "chat")
