"""The page docs/add_a_system.md, executed: a process, a head, a data set and a system of a package of one's own."""

import importlib.util
import pathlib
import re
import sys

import jax
import numpy as np
import pytest

from src.build import build_system
from src.data import example
from src.data.templates._base import Template
from src.train.trainer import make_trainer, open_data

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "add_a_system.md"
BLOCK = re.compile(r"```python\n# (mine/\w+\.py)\n(.*?)```", re.DOTALL)


@pytest.fixture
def config(tmp_path, monkeypatch):
    """The config of the page, with its package where Python finds it."""
    blocks = dict(BLOCK.findall(PAGE.read_text()))
    assert len(blocks) == 5 and max(text.count("\n") for text in blocks.values()) <= 50
    (tmp_path / "mine").mkdir()
    for path, text in blocks.items():
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    spec = importlib.util.spec_from_file_location("bars_config", tmp_path / "mine" / "bars_config.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module.get_config("debug")
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def test_the_system_of_the_page_trains_and_draws(config):
    with config.unlocked():
        config.mesh.data = 1
    system = build_system(config)
    assert system.fields["image"].process.outputs == 4
    trainer = make_trainer(system, jax.devices()[:1])
    state, data, step = trainer.init(), open_data(trainer), trainer.compile()
    losses = []
    with jax.set_mesh(trainer.mesh):
        for number in range(30):
            state, measured = step(state, trainer.place(next(data), number))
            term = measured.terms["draw/image/mse"]
            losses.append(float(term.total / term.count))
    data.close()
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    pipeline = system.pipeline.with_params(state.ema)
    (made,) = pipeline("draw", [{"caption": "the third row"}], seed=0)
    assert made["image"].shape == (8, 8, 1) and np.isfinite(made["image"]).all()


def test_a_misspelt_option_names_its_path_in_the_config(config):
    with config.unlocked():
        config.fields.image.head.hiden = 3
    with pytest.raises(ValueError, match=r"fields\.image\.head.*hiden.*hidden"):
        build_system(config)


def test_the_page_lists_what_a_source_and_a_template_may_have():
    page = PAGE.read_text().partition("## Members")[2]
    source = re.findall(r"^    (\w+(?:, \w+)*)   ", example.__doc__, re.MULTILINE)[:11]
    names = {name for words in source for name in words.split(", ")}
    assert {"texts", "held_out", "drawn", "judged", "identity"} <= names
    names |= {name for name in vars(Template) if not name.startswith("_")}
    assert {"targets", "bind", "invented_question"} <= names
    assert not [name for name in names if f"`{name}" not in page]
