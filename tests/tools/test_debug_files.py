"""Every `:debug` has its files on a fresh clone."""

import importlib
import os
import tempfile

import pytest

from src.build import build_system
from src.tools.datasets import debug_files
from src.train.trainer import check_data

FORMS = [("tinyllama_finetune", "debug"), ("journeydb_ultrachat", "debug"), ("imagenet256", "debug"),
         ("imagenet256", "pixels,debug"), ("llava_journeydb", "debug"), ("llava_journeydb", "vae,pixels,debug"),
         ("sit_xl2_imagenet256", "debug"), ("sit_xl2_imagenet256", "official,debug")]  # fmt: skip


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


def test_a_path_of_the_command_line_stays(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    config = importlib.import_module("configs.tinyllama_finetune").get_config("debug")
    config.tasks.chat.source.folder = "data/nowhere"
    made = debug_files.fill(config, {"tasks.chat.source.folder", "init_from.path"})
    assert made == ["fields.text.codec.path"]
    assert (config.tasks.chat.source.folder, config.init_from.path) == ("data/nowhere", "data/tinyllama")
