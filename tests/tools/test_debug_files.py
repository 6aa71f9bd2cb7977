"""Every `:debug` has its files on a fresh clone."""

import importlib
import os
import sys
import tempfile

import pytest
from absl import flags
from ml_collections import config_flags

from src.build import build_system
from src.common.runtime import config_flag
from src.tools.datasets import debug_files
from src.train.trainer import check_data

FORMS = [("tinyllama_finetune", "debug"), ("journeydb_ultrachat", "debug"), ("imagenet256", "debug"),
         ("imagenet256", "pixels,debug"), ("llava_journeydb", "debug"), ("llava_journeydb", "vae,pixels,debug"),
         ("sit_xl2_imagenet256", "debug"), ("sit_xl2_imagenet256", "official,debug"),
         ("llada_8b", "debug"), ("showo", "debug"), ("backbones", "debug")]  # fmt: skip


@pytest.mark.faults
@pytest.mark.parametrize(("name", "variant"), FORMS)
def test_the_data_and_weights_of_every_debug_are_made_once(name, variant, tmp_path_factory, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.getbasetemp()))
    get_config = importlib.import_module(f"configs.{name}").get_config
    configs = get_config(variant), get_config(variant)
    made = [debug_files.fill(config) for config in configs]
    assert made[0] == made[1]
    for task in configs[0].tasks:
        assert any(key.startswith(f"tasks.{task}.source.") for key in made[0]), task
    assert configs[0] == configs[1] and not debug_files.fill(configs[0])
    system = build_system(configs[0])
    check_data(system)
    if configs[0].init_from.path:
        assert os.path.exists(f"{configs[0].init_from.path}/weights.json")
    for plan in system.tasks.values():
        assert plan.task.rows("train") > plan.rows


def command_line(monkeypatch, *arguments):
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "", flag_values=values)
    argv = ["program", *arguments]
    monkeypatch.setattr(sys, "argv", argv)  # config flags look for their overrides there
    config_flag.parse(values, argv)
    return values


@pytest.mark.parametrize("key", ["tasks.chat.source.folder", "fields.text.codec.path"])
def test_a_missing_path_of_the_command_line_is_refused(monkeypatch, tmp_path, key):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    wrong = f"--config.{key}=data/nowhere"
    values = command_line(monkeypatch, "--config=configs/tinyllama_finetune.py:debug", wrong)
    with pytest.raises(FileNotFoundError, match=f"^{wrong} does not exist: correct it, or leave it out$"):
        debug_files.fill_for(values)


def test_initial_weights_of_the_command_line_are_never_invented(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    arguments = "--config=configs/tinyllama_finetune.py:debug", "--config.init_from.path=data/nowhere"
    values = command_line(monkeypatch, *arguments)
    with caplog.at_level("WARNING"):
        made = debug_files.fill_for(values)
    config = values["config"].value
    assert made == ["fields.text.codec.path", "tasks.chat.source.folder"]
    assert config.init_from.path == "data/nowhere" and config.tasks.chat.source.folder != "data/ultrachat"
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2 and "tasks.chat.source.folder=data/ultrachat does not exist" in told[1]
    assert all("invented content" in each for each in told)


def test_what_an_own_config_names_is_never_invented(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lines = "from configs import tinyllama_finetune", "get_config = tinyllama_finetune.get_config"
    (tmp_path / "mine.py").write_text("\n".join(lines))
    values = command_line(monkeypatch, f"--config={tmp_path}/mine.py:debug")
    before = values["config"].value.to_dict()
    assert debug_files.fill_for(values) == [] and values["config"].value.to_dict() == before


def test_initial_weights_beside_a_codec_without_a_file_stay(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = importlib.import_module("configs.digits").get_config("debug")
    with config.unlocked():
        config.fields.text.codec = {"name": "text:Bytes"}
    config.init_from.path = str(tmp_path / "weights")
    assert debug_files.fill(config) == [] and config.init_from.path == str(tmp_path / "weights")
    config.tasks.number_sentences.source = {}
    with pytest.raises(ValueError, match=r"^tasks\.number_sentences\.source needs a 'name'"):
        debug_files.fill(config)
