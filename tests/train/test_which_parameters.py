"""Evaluation and sampling use the averaged parameters, or the last ones when the config says so."""

import types

import numpy as np
import pytest
from ml_collections import ConfigDict

from src import run
from src.common.runtime.writers import Many
from src.evals.result import Result
from src.sequence.layout import Layout, Segment
from src.train import loop
from src.train.state import TrainState

STATE = TrainState(step=np.int32(3), params="last", ema="averaged", opt_state=(), extra={})
LAYOUT = Layout((Segment("image", "image", 4),))


class Spy:
    """A predictor that keeps which parameters it drew with."""

    def __init__(self, drawn, params=None):
        self.drawn, self.params, self.tasks = drawn, params, {"t": (None, LAYOUT, "image")}

    def with_params(self, params):
        return Spy(self.drawn, params)

    def task(self, name, kind=None):
        return types.SimpleNamespace(classes=10, image_shape=(8, 8, 1)), LAYOUT, "image"

    def draw(self, task, *, seed, words=None, labels=None, grid=None):
        self.drawn.append((self.params, seed))
        return np.zeros((len(words or labels), 8, 8, 1), np.float32)


def system_of(ema):
    """(system, list of what it will have drawn)."""
    drawn = []
    evaluate = lambda predict, seed: Result({"size": float(predict.draw("t", labels=[1], seed=seed).size)}, {}, {})
    config = ConfigDict({"seed": 11, "eval": {"ema": ema}})
    return types.SimpleNamespace(config=config, predictor=Spy(drawn), evaluators={"e": evaluate}), drawn


@pytest.mark.parametrize("ema, expected", [(True, "averaged"), (False, "last")])
def test_evaluation(ema, expected):
    system, drawn = system_of(ema)
    assert loop.evaluate(system, STATE, Many([]), 3) == {"size": 64.0}
    assert drawn == [(expected, 11)]


@pytest.mark.parametrize("ema, expected", [(True, "averaged"), (False, "last")])
def test_sampling(ema, expected, monkeypatch, tmp_path):
    system, drawn = system_of(ema)
    monkeypatch.setattr(run, "_restored", lambda flags: (system, STATE, tmp_path))
    monkeypatch.setattr(run, "use_program_cache", lambda: None)
    path = tmp_path / "seven.png"
    asked = {"prompt": None, "image": None, "label": 7, "task": None, "grid": None, "count": 2, "output": str(path)}
    run.sample(types.SimpleNamespace(**asked), 0.0)
    assert drawn == [(expected, 11)] and path.exists()
