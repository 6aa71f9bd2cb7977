"""A misspelt or missing key of a config is one sentence with its place and the nearest known key."""

import pickle
import sys

import pytest
from absl import flags
from ml_collections import ConfigDict, config_flags

from configs import common, digits, showo_digits, sit_xl2_imagenet256, tinyllama_finetune
from src.build import build_system
from src.common.lookup import build
from src.common.runtime import config_flag
from src.common.runtime.config_dict import Config
from src.common.runtime.config_keys import check_keys

MODULES = (digits, showo_digits, sit_xl2_imagenet256, tinyllama_finetune)


def places(group, path=()):
    """Every group and key below, as paths."""
    for key in group:
        yield (*path, key)
        if isinstance(group[key], ConfigDict):
            yield from places(group[key], (*path, key))


def without(module, path, *instead):
    """The config with a key left out, or renamed, or a group made a number."""
    plain = group = module.get_config("debug").to_dict()
    for key in path[:-1]:
        group = group[key]
    value = group.pop(path[-1])
    for word in instead:
        group[word] = value if isinstance(word, str) and word != path[-1] else 3
    return Config(plain)


ONE_IN_THE_SUITE = [MODULES[0], *(pytest.param(m, marks=pytest.mark.faults) for m in MODULES[1:])]


@pytest.mark.parametrize("module", ONE_IN_THE_SUITE, ids=lambda m: m.__name__)
def test_every_misspelt_key_of_a_fixed_group_is_named_with_its_place_and_the_nearest(module):
    model, count = common.base(), 0
    for path in places(module.get_config("debug")):
        group = model
        for key in path[:-1]:
            group = group.get(key) if isinstance(group, ConfigDict) else None
        fixed = isinstance(group, ConfigDict) and path[-1] in group and "name" not in group
        row = len(path) == 3 and path[0] in ("tasks", "fields")
        if not row and (not fixed or path[0] == "decode"):
            continue
        wrong = f"{path[-1]}q"
        with pytest.raises(ValueError) as told:
            check_keys(without(module, path, wrong))
        text = str(told.value)
        assert repr(wrong) in text and f"did you mean {path[-1]}" in text and "\n" not in text, text
        assert all(key in text for key in path), text
        count += 1
    assert count > 100


SINGLE = ("seed", "steps", "batch", "accumulate", "teacher", "compiled_step")


def test_a_group_that_is_none_and_one_that_is_missing_are_sentences():
    for path in places(digits.get_config("debug")):
        if len(path) == 1 and path[0] not in SINGLE:
            with pytest.raises(ValueError, match=rf"^the config has {path[0]}=3; it must be a group$"):
                check_keys(without(digits, path, path[0]))
            with pytest.raises(ValueError, match=rf"^the config has no {path[0]}; add it, as in configs/common.py$"):
                check_keys(without(digits, path))


@pytest.mark.parametrize(
    ("path", "words"),
    [
        (("tasks", "number_sentences", "weight"), r"^tasks.number_sentences has no weight: it needs weight, source"),
        (("tasks", "number_sentences", "objectives"), r"^tasks.number_sentences has no objectives: it needs weight"),
        (("tasks", "number_sentences", "source"), r"^tasks.number_sentences has no source: it needs"),
        (("tasks", "number_sentences", "template"), r"^tasks.number_sentences has no template: it needs"),
        (("tasks", "number_sentences", "source", "name"), r"^tasks.number_sentences.source needs a 'name'"),
        (("tasks", "number_sentences", "objectives", "text", "weight"), r"objectives.text has no weight: give one"),
        (("fields", "text", "codec"), r"^fields.text has no codec"),
        (("model", "trunk", "width"), r"^the config has no model.trunk.width"),
        (("model", "conditioning"), r"^the config has no model.conditioning"),
        (("ema", "warmup"), r"^the config has no ema.warmup"),
    ],
)
def test_what_a_task_or_field_needs_is_asked_for(path, words):
    with pytest.raises(ValueError, match=words):
        build_system(without(digits, path))


@pytest.mark.parametrize(
    ("path", "word", "words"),
    [
        (
            ("tasks", "number_sentences", "weight"),
            "share",
            r"tasks.number_sentences has no option 'share'.*weight now$",
        ),
        (("tasks", "number_sentences", "source"), "data", r"no option 'data'; it is called source and template now$"),
        (("tasks", "number_sentences", "objectives", "text", "weight"), "wieght", r"no weight but 'wieght'"),
        (("decode", "image"), "imgae", r"^decode has no field 'imgae'; did you mean image"),
        (
            ("fields", "text", "codec", "name"),
            "nmae",
            r"text.codec has no stage 'nmae' \(did you mean name\?\)",
        ),
        (("fields", "image", "codec", "device"), "devcie", r"fields.image.codec has no stage 'devcie'.*device"),
        (
            ("fields", "image", "process", "schedule", "name"),
            "nmae",
            r"image.process.schedule has no 'name' but 'nmae'",
        ),
        (("fields", "image", "process", "schedule"), "shedule", r"fields.image.process.*'shedule'.*mean schedule"),
        (("tasks", "number_sentences", "source", "relations"), "relation", r"s.source: .*'relation'.*mean relations"),
        (("eval", "evaluators", "digits", "images"), "imges", r"^eval.evaluators.digits: .*'imges'.*mean images"),
        (("model", "conditioning", "init"), "inti", r"^model.conditioning .*'inti' .*mean init"),
        (("decode", "text", "choose", "name"), "naem", r"^decode.text.choose has no 'name' but 'naem'"),
        (("optim", "lr"), "learning_rate", r"^optim has no option 'learning_rate' in optim; there are .*lr, "),
        (("seed",), "lr", r"^the config has no option 'lr'; did you mean optim.lr\?$"),
    ],
)
def test_a_misspelt_key_of_a_part_or_table_is_one_sentence(path, word, words):
    with pytest.raises(ValueError, match=words):
        build_system(without(digits, path, word))


@pytest.mark.parametrize("value", [3, "digits", ["digits"], None])
def test_what_is_no_group_is_no_part(value):
    with pytest.raises(ValueError, match=r"^tasks.a.source: a part of src/data/sources is a group"):
        build("data/sources", value, where="tasks.a.source")


def test_a_base_is_locked_and_its_tables_are_not():
    config = common.base()
    for group, key, near in (
        (config, "stesp", "steps"),
        (config.optim, "lrr", "lr"),
        (config.model.trunk, "dept", "h"),
    ):
        with pytest.raises(AttributeError, match=f"{key}.*{near}"):
            setattr(group, key, 1)
        with pytest.raises(AttributeError, match=key):
            getattr(group, key)
        with pytest.raises(KeyError, match=key):
            group.update({key: 1})
    config.tasks.mine = {"weight": 1.0, "objectives": {}}
    config.tasks.mine.objectives.words = common.next_token("text")
    config.fields.text = common.text()
    config.decode.sound = {"name": "blocks", "steps": 3}
    config.eval.evaluators.mine = {"name": "digits"}
    assert config.is_locked and config.tasks.mine.objectives.words.weight == 1.0
    with pytest.raises(TypeError, match=r"^the config has steps='10', str, and must be int$"):
        config.steps = "10"
    again = pickle.loads(pickle.dumps(config))
    assert again == config and again.decode.sound._path == "decode.sound" and again.is_locked


def test_a_part_is_replaced_and_a_group_is_merged():
    config = common.base()
    config.model.update({"conditioning": {"name": "conditioning:TimeToken", "init": "fixed"}})
    config.model.update({"conditioning": {"name": "conditioning:AdaLNPerLayer"}, "time": {"features": 8}})
    assert config.model.conditioning.to_dict() == {"name": "conditioning:AdaLNPerLayer"}
    assert config.model.time.to_dict() == {"features": 8, "init": "normal:0.02"}
    config.update({"decode": {"image": {"name": "left_to_right"}}, "steps": 3})
    assert config.decode.image.to_dict() == {"name": "left_to_right"} and "text" in config.decode
    config.decode.text.update({"name": "blocks", "steps": 2})
    assert config.decode.text.to_dict() == {"name": "blocks", "steps": 2}
    config.decode.text.update({"steps": 5})
    assert config.decode.text.to_dict() == {"name": "blocks", "steps": 5} and config.is_locked


START = (
    "from configs import common\ndef get_config(name=None):\n    config = common.base()\n    {}\n    return config\n"
)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("config.stesp = 3", "mine.py, line 4: the config has no such field: stesp; did you mean steps?"),
        ("config.optim.lrr = 3", "mine.py, line 4: the config has no such field: lrr; did you mean lr in optim?"),
        ("config.optim.update({'warmpu': 3})", "mine.py, line 4: the config has no such field: warmpu; did you mean w"),
        ("config.modle.dtype = 'float32'", "mine.py, line 4: the config has no such field: modle; did you mean model?"),
        ("config.lr = 3", "mine.py, line 4: the config has no such field: lr; did you mean optim.lr?"),
        ("config.steps = '3'", "mine.py, line 4: the config has steps=3, str, and must be int"),
        ("config.optim = 3", "mine.py, line 4: the config has optim=3, int, and must be a group"),
        ("config.steps = stesp", "mine.py, line 4: NameError: name stesp is not defined"),
        ("common.txt()", "mine.py, line 4: AttributeError: module configs.common has no attribute txt"),
        ("config = None", "get_config gives NoneType, and must return the config"),
        ("return 1 / 0", "mine.py, line 4: ZeroDivisionError: division by zero"),
        ("config.steps = = 3", "mine.py, line 4: SyntaxError: invalid syntax"),
        ("open('nowhere')", "No such file or directory: nowhere"),
    ],
)
def test_a_mistake_in_a_config_of_any_folder_is_one_sentence_with_its_line(line, words, tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "mine.py").write_text(START.format(line))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as told:
        parsed(monkeypatch, "--config=deep/mine.py")
    assert words in str(told.value) and "\n" not in str(told.value)


def test_a_config_without_its_function_says_so(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("config = 3\n")
    with pytest.raises(ValueError, match=r"mine.py has no function get_config, which must return the config$"):
        parsed(monkeypatch, f"--config={tmp_path}/mine.py")


def parsed(monkeypatch, *words):
    """The config of a command line."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    flags.DEFINE_string("workdir", None, "", flag_values=values)
    flags.DEFINE_string("prompt", None, "", flag_values=values)
    monkeypatch.setattr(sys, "argv", ["main", *words])
    monkeypatch.delitem(sys.modules, "config_config", raising=False)  # a program reads one config
    config = config_flag.parse(values, sys.argv)
    return config, values


def test_a_home_folder_is_meant_by_a_tilde_in_flags_and_configs(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "mine.py").write_text(START.format("config.init_from.path = '~/weights'"))
    monkeypatch.chdir(tmp_path)
    words = ("--config=~/mine.py", "--workdir=~/run", "--prompt=~/not a path")
    config, values = parsed(monkeypatch, *words)
    assert values.workdir == f"{tmp_path}/home/run" and values.prompt == "~/not a path"
    config, values = parsed(monkeypatch, "--config", "~/mine.py", "--workdir=$HOME/~")
    assert values.workdir == "$HOME/~" and config.init_from.path == "~/weights"
    with pytest.raises(ValueError, match=r"^--workdir: there is no user 'nobody-here' on this machine"):
        parsed(monkeypatch, "--config=~/mine.py", "--workdir=~nobody-here/run")
