"""A value of the wrong kind in a config is one sentence that names its key."""

import dataclasses
import importlib
import re

import numpy as np
import pytest

from src.build import build_field, build_system
from src.common import lookup, tree
from src.common.lookup import check_kinds, telling
from src.common.runtime.config_keys import check_keys
from src.data.images import Images
from src.data.splits import rows_of
from src.models.model import Model
from src.train import optim


@pytest.fixture
def config():
    return importlib.import_module("configs.digits").get_config("debug").unlock()


def put(config, path, value):
    *groups, last = path.split(".")
    for part in groups:
        config = config[part]
    with config.ignore_type():
        config[last] = value


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        ("guidance.interval", (0.5,), "guidance.interval=(0.5,); give two times"),
        ("tasks.caption_to_image.source", {}, "tasks.caption_to_image.source needs a 'name'"),
        ("tasks.caption_to_image.weight", "1", "tasks.caption_to_image.weight='1'; it must be a number"),
        ("tasks.caption_to_image.objectives.diffusion.weight", "1", "diffusion.weight='1'; it must be a number"),
        ("tasks.caption_to_image.objectives.diffusion.weight", None, "diffusion.weight=None; it must be a number"),
        ("tasks.caption_to_image.source.shift", "2", "source: Digits (src/data/sources/digits.py) has shift='2'"),
        ("tasks.caption_to_image.template.row_length", 64.5, "row_length=64.5; it must be a whole number"),
        ("tasks.number_sentences.source.relations", "sum", "has relations='sum'; it must be a tuple"),
        ("fields.image.codec.host.height", "8", "fields.image.codec.host: Pixels"),
        ("decode.image.steps", (2,), "decode.image.steps=(2,); it must be a number"),
        ("model.conditioning.init", 3, "model.conditioning (TimeToken) has init=3; it must be text"),
    ],
)
def test_each_names_its_key(config, path, value, told):
    put(config, path, value)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        build_system(config)
    assert "\n" not in str(error.value)


@dataclasses.dataclass
class Sized:
    size: int = 1
    rate: "float | None" = None
    flag: bool = False
    names: tuple[str, ...] = ()
    other: Model | None = None


def test_annotations_say_what_a_value_may_be():
    good = {"size": np.int64(3), "rate": 1, "flag": True, "names": ["a"], "other": "anything"}
    check_kinds(Sized, good, "here")
    check_kinds(Sized, {"rate": None}, "here")
    for key, value, told in (("size", 1.0, "a whole number"), ("size", True, "a whole number"), ("flag", 1, "True or"),
                             ("rate", "1", "a number or None"), ("names", "a", "a tuple")):  # fmt: skip
        with pytest.raises(ValueError, match=f"^here has {key}={value!r}; it must be {told}"):
            check_kinds(Sized, {key: value}, "here")


@pytest.mark.parametrize("raised", [TypeError("wrong"), AttributeError("wrong"), IndexError("wrong"), KeyError("wrong"),
                                    ZeroDivisionError("wrong")])  # fmt: skip
def test_what_a_constructor_raises_is_told_with_the_options(raised, monkeypatch):
    class Part:
        def __init__(self, size):
            raise raised

    monkeypatch.setattr(lookup, "lookup", lambda folder, name: Part)
    with pytest.raises(ValueError, match=r"^tasks\.a\.source: Part \(.*size=\(1, 2\)") as error:
        lookup.build("data/sources", {"name": "part", "size": (1, 2)}, where="tasks.a.source")
    assert type(raised).__name__ in str(error.value) and error.value.__cause__.__cause__ is raised
    with pytest.raises(RuntimeError), telling("here", {}):
        raise RuntimeError("of another kind")


def test_a_held_out_number_of_an_own_source_is_a_whole_number():
    class Own(list):
        held_out = "2"

    with pytest.raises(ValueError, match="held_out='2' is not possible: give a whole number"):
        rows_of(Own([1, 2, 3]), "train")


@pytest.mark.parametrize("rules", [("trunk", 0.0), (("trunk",),), ((0.0, "trunk"),), 0.5, (("a", 1.0, 2.0),)])
def test_a_rule_is_a_pair(rules):
    form = r"contain .*: each rule is a pair \(regex, value\), as in "
    with pytest.raises(ValueError, match=f"^the rules {form}"):
        tree.check_rules(rules, "the rules")
    for name in ("lr_multipliers", "decays"):
        with pytest.raises(ValueError, match=rf"^optim\.{name}' rules {form}"):
            optim.build_optimizer({name: rules}, {"trunk": {"a": np.zeros(1)}})
    if rules != 0.5:
        with pytest.raises(ValueError, match=rf"^optim\.weight_decay's rules {form}"):
            optim.build_optimizer({"weight_decay": rules}, {"trunk": {"a": np.zeros(1)}})


def test_the_value_of_a_rule_is_a_number():
    with pytest.raises(ValueError, match=r"optim\.lr_multipliers has the value '0'; values are numbers"):
        optim.build_optimizer({"lr_multipliers": ((".*", "0"),)}, {"a": np.zeros(1)})


@pytest.mark.parametrize(
    ("own", "told"),
    [
        (("imag",), "'imag', which is no field; did you mean image in fields?"),
        (("image", "words"), "'words', which is"),
    ],
)
def test_fields_with_parts_of_their_own_are_fields(config, own, told):
    config.model.mot_fields = own
    with pytest.raises(ValueError, match=re.escape(f"model.mot_fields has {told}")):
        build_system(config)


def test_the_default_fields_with_parts_of_their_own_need_not_be_there(config):
    for own in (("image", "vision"), ("text",), ()):
        config.model.mot_fields = own
        check_keys(config)


@pytest.mark.parametrize("channels", [2, 4])
def test_pixels_have_one_or_three_channels(config, channels):
    config.fields.image.codec.host.channels = channels
    field = build_field("image", config.fields.image, lambda what, link: None)
    with pytest.raises(ValueError, match=rf"^fields\.image\.codec: channels={channels}; images have 1 or 3$"):
        Images("image", field, [], made=True).check([])
    arrays = type("Arrays", (list,), {"holds": "values"})()
    Images("image", field, arrays, made=True).check(arrays)
    config.fields.image.codec.host.channels = 3
    field = build_field("image", config.fields.image, lambda what, link: None)
    Images("image", field, [], made=True).check([])
