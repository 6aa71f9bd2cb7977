"""Evaluation and sampling use the averaged parameters, or the last ones when the config says so."""

import dataclasses
import types

import numpy as np
import pytest

from configs import sit_digits
from src import run
from src.build import build_system
from src.common.runtime.writers import Many
from src.evals.result import Result
from src.train import loop
from src.train.state import TrainState
from tests.helpers.runs import config_of

STATE = TrainState(np.int32(3), {"w": "last"}, {"w": "averaged"}, (), {"teacher": "kept", "guard": {"skipped": 0}})


class Spy:
    """A pipeline that keeps which parameters it made images with."""

    def __init__(self, pipeline, made, params=None):
        self.pipeline, self.made, self.params = pipeline, made, params

    def __getattr__(self, name):
        return getattr(self.pipeline, name)

    def with_params(self, params):
        return Spy(self.pipeline, self.made, params)

    def __call__(self, task, given, seed):
        self.made.append((self.params, seed))
        return [{"image": np.zeros((8, 8, 1), np.uint8)}] * len(given)


def system_of(ema):
    """(system, list of what it will have made images with)."""
    made = []
    system = build_system(config_of(sit_digits, **{"eval.ema": ema, "seed": 11}))
    evaluate = lambda pipeline, seed: Result({"count": float(len(pipeline("t", [1, 2], seed)))}, {}, {})
    return dataclasses.replace(system, pipeline=Spy(system.pipeline, made), evaluators={"e": evaluate}), made


@pytest.mark.parametrize("ema, expected", [(True, "averaged"), (False, "last")])
def test_evaluation(ema, expected):
    system, made = system_of(ema)
    assert loop.evaluate(system, STATE, Many([]), 3) == {"count": 2.0}
    assert made == [({"w": expected, "teacher": "kept"}, 11)]


@pytest.mark.parametrize("ema, expected", [(True, "averaged"), (False, "last")])
def test_sampling(ema, expected, monkeypatch, tmp_path):
    system, made = system_of(ema)
    monkeypatch.setattr(run, "_workdir", lambda flags: tmp_path)
    monkeypatch.setattr(run, "_build", lambda flags: system)
    monkeypatch.setattr(run, "restore_checkpoint", lambda *_: STATE)
    monkeypatch.setattr(run, "use_program_cache", lambda: None)
    path = tmp_path / "seven.png"
    monkeypatch.setattr(run.config_flag, "name_of", lambda flags: "configs/sit_digits.py")
    monkeypatch.setattr(run.config_flag, "overrides", lambda flags: {})
    asked = {"prompt": None, "image": None, "label": 7, "task": None, "grid": None, "count": 2, "given": []}
    asked |= {"prompts": None, "format": ["grid"], "step": "latest"}
    run.sample(types.SimpleNamespace(**asked, output=str(path)), 0.0)
    assert made == [({"w": expected, "teacher": "kept"}, 11)] and path.exists()
