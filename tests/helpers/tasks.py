"""The digits' tasks, as the configs have them, on bytes instead of a learned tokenizer."""

from src.codecs.chain import build_chain
from src.data.sources.canvas import Canvas
from src.data.sources.digits import Digits
from src.data.sources.numbers import Numbers
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.class_label import ClassLabel
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.text import Text
from src.interfaces import Field


def nothing(what, link):
    """No codec of these learns anything."""
    raise AssertionError(what)


def fields(size=8, patch=2):
    """A table of text, an image of size x size pixels, and ten classes."""
    image = {"host": {"name": "pixels", "height": size, "width": size, "channels": 1}}
    codecs = {
        "text": {"host": {"name": "text:Bytes"}},
        "image": image | {"device": {"name": "patch", "size": patch}},
        "label": {"host": {"name": "classes", "count": 10}},
    }
    chains = {name: build_chain(codec, f"fields.{name}.codec", nothing) for name, codec in codecs.items()}
    return {name: Field(name, chain.spec, chain) for name, chain in chains.items()}


def digit_tasks(shift=1):
    """Those of configs/digits.py and configs/sit_digits.py."""
    table = fields()
    made = {
        "caption_to_image": (Digits(shift=shift), CaptionToImage()),
        "image_to_caption": (Digits(shift=shift), ImageToCaption()),
        "number_sentences": (Numbers(), Text()),
        "label_to_image": (Digits(shift=shift), ClassLabel()),
    }
    return {name: SourceTask(name, *parts, table) for name, parts in made.items()}


def canvas_tasks():
    """Those of configs/digits_canvas.py."""
    table = fields(16, 4)
    made = {"canvas_caption_to_image": CaptionToImage(), "canvas_image_to_caption": ImageToCaption()}
    return {name: SourceTask(name, Canvas(), template, table) for name, template in made.items()}
