"""The share of initial weights in the moving average, in closed form, and the warning where it is large."""

import importlib
import types

import jax.numpy as jnp
import pytest
from absl import logging

from configs import common, sit_xl2_imagenet256
from src.train import average
from src.train.average import check_average, initial_share, used_params
from src.train.optim import ema_update

USUAL = {"decay": 0.9999, "more": (), "power": ()}


@pytest.mark.parametrize(
    ("decay", "warmup", "steps", "share"),
    [
        (0.9999, False, 1000, 0.9048329),  # 90 %
        (0.9999, False, 5000, 0.6065155),  # 61 %
        (0.9999, True, 1, 0.1),
        (0.9999, True, 2, 0.1 * 2 / 11),
        (0.9999, True, 5000, 1.8e-28),
        (0.99, False, 100, 0.3660323),
        (1.0, False, 7, 1.0),
        (0.0, False, 3, 0.0),
        (0.05, True, 2, 0.0025),  # the warm-up is above the decay from the beginning
        (0.5, True, 0, 1.0),
    ],
)
def test_the_share_of_published_settings(decay, warmup, steps, share):
    assert initial_share(decay, warmup, steps) == pytest.approx(share, rel=2e-2 if share < 1e-20 else 1e-6)


@pytest.mark.parametrize("decay", [0.0, 0.1, 0.3, 0.5, 0.9, 0.99, 0.9999, 1.0])
@pytest.mark.parametrize("warmup", [False, True])
def test_the_closed_form_is_what_the_update_does(decay, warmup):
    share = {"w": jnp.ones(())}
    for step in range(60):
        assert initial_share(decay, warmup, step) == pytest.approx(float(share["w"]), rel=1e-4, abs=1e-30), step
        share = ema_update(share, {"w": jnp.zeros(())}, decay, step, warmup)


@pytest.fixture
def said(monkeypatch):
    """The warnings."""
    lines = []
    monkeypatch.setattr(logging, "warning", lambda text, *values: lines.append(text % values))
    average._warn.cache_clear()
    return lines


def test_a_warning_names_the_share_once_a_step_and_only_above_the_limit(said):
    for step in (5000, 5000, 40_000):
        check_average({"decay": 0.9999, "warmup": False}, step)
    assert len(said) == 1 and "after 5000 steps is 61 % initial weights" in said[0] and "ema.warmup=True" in said[0]
    check_average({"decay": 0.9999, "warmup": False}, 29_000)  # 5.5 %
    assert len(said) == 2 and "6 % initial weights" in said[1]
    for decay, warmup, step in ((0.9999, True, 3), (0.9999, False, 30_000), (0.9999, False, 0), (0.995, True, 1000)):
        check_average({"decay": decay, "warmup": warmup}, step)
    assert len(said) == 2
    check_average({"decay": 0.9999, "warmup": True}, 1)
    assert len(said) == 3 and "train longer" in said[2]


def test_what_is_sampled_and_measured_warns_unless_it_uses_the_last_weights(said):
    config = common.base()
    config.ema.warmup = False
    state = types.SimpleNamespace(step=1100, ema="average", params="last", extra={"guard": {"skipped": 100}})
    assert used_params(state, config) == "average" and "after 1000 steps is 90 % initial weights" in said[0]
    config.eval.ema = False
    assert used_params(state, config) == "last" and len(said) == 1


@pytest.mark.parametrize("name", ["imagenet256", "journeydb_ultrachat", "llava_journeydb", "tinyllama_finetune"])
def test_the_average_warms_up_but_not_as_published(name):
    module = importlib.import_module(f"configs.{name}")
    assert module.get_config("").ema.to_dict() == USUAL | {"warmup": True}
    assert module.get_config("official").ema.to_dict() == USUAL | {"warmup": False}


def test_the_average_of_sit_as_published_does_not_warm_up():
    assert sit_xl2_imagenet256.get_config("official").ema.to_dict() == USUAL | {"warmup": False}
    assert sit_xl2_imagenet256.get_config("").ema.to_dict() == USUAL | {"warmup": True}
