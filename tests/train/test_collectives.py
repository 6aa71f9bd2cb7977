"""What crosses the network in one step, counted in the compiled program: no more than sharded training must move."""

import math
from collections import Counter

import jax
import pytest

from configs import digits
from src.build import build_system
from src.common.tree import flatten
from src.tools.hlo import collectives
from src.train import loop


def compiled(**mesh):
    """Trainer, and bytes that one device receives in a step by (kind, axes). One row length: one trunk pass."""
    config = digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators = {}
        del config.tasks["number_sentences"]
        config.batch, config.sharding.min_size = 56, 512
        config.model.trunk.update({"width": 64, "mlp_width": 256, "depth": 3})
        config.mesh.update({"data": 1} | {k: v for k, v in mesh.items() if k != "remat"})
        config.model.trunk.remat = mesh.get("remat", "none")
    trainer = loop.make_trainer(build_system(config), jax.devices())
    moved = Counter()
    for c in collectives(trainer.compile().as_text(), dict(trainer.mesh.shape)):
        moved[c.kind, c.axes] += c.bytes * c.times
    return trainer, moved


def size(trainer, *, split):
    """Bytes of the parameters that are split over fsdp, or of those that are not."""
    leaves = flatten(trainer.abstract.params).values()
    return sum(4 * math.prod(p.shape) for p in leaves if ("fsdp" in p.sharding.spec) == split)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_fully_sharded_weights_are_gathered_twice_and_gradients_scattered_once(remat):
    trainer, moved = compiled(fsdp=8, remat=remat)
    weights, rest = size(trainer, split=True) * 7 / 8, size(trainer, split=False)
    assert rest < weights / 20, "a test of the sharded ones"
    assert moved["reduce-scatter", ("fsdp",)] == weights
    assert moved["all-gather", ("fsdp",)] <= 2 * weights
    assert sum(moved.values()) <= 1.15 * 3 * weights, moved


def test_the_data_axis_adds_up_only_what_a_device_keeps():
    trainer, moved = compiled(data=2, fsdp=4)
    weights, rest = size(trainer, split=True), size(trainer, split=False)
    assert moved["reduce-scatter", ("fsdp",)] == weights * 3 / 4
    assert moved["all-reduce", ("data",)] <= 1.15 * (weights / 4)  # 2 F (n - 1) / n of a quarter, n = 2
    assert moved["all-reduce", ("data", "fsdp")] <= 1.15 * (2 * rest * 7 / 8)


def test_data_parallel_devices_exchange_gradients_and_nothing_else():
    trainer, moved = compiled(data=8)
    assert set(moved) == {("all-reduce", ("data",))}
    gradients = size(trainer, split=False) * 2 * 7 / 8
    assert gradients <= moved["all-reduce", ("data",)] <= 1.02 * gradients
