"""What crosses the network in one step, counted in the compiled program: no more than sharded training must move."""

import math
from collections import Counter

import jax
import pytest

from configs import digits
from src.build import build_system
from src.common.tree import flatten
from src.models import transformer
from src.tools.compile.hlo import collectives
from src.train.trainer import make_trainer


def compiled(remat="none", accumulate=1, **mesh):
    """Trainer, and bytes that one device receives in a step by (kind, axes). One row length: one trunk pass."""
    config = digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators = {}
        del config.tasks["number_sentences"]
        config.batch, config.sharding.min_size, config.accumulate = 56 * accumulate, 512, accumulate
        config.model.trunk.update({"width": 64, "mlp_width": 256, "depth": 3, "kv_heads": 2, "remat": remat})
        config.mesh.update({"data": 1} | mesh)
    trainer = make_trainer(build_system(config), jax.devices())
    moved = Counter()
    for c in collectives(trainer.compile().as_text(), dict(trainer.mesh.shape)):
        moved[c.kind, c.axes] += c.bytes * c.times
    return trainer, moved


@pytest.fixture(autouse=True)
def looped(monkeypatch):
    """The layers as a loop, which they are on accelerators; few layers are unrolled on CPU, and then forward and
    backward pass share what they gather."""
    monkeypatch.setattr(transformer, "UNROLLED", 0)


def size(trainer, *, split, below=""):
    """Bytes of the parameters below a path that are split over fsdp, or of those that are not."""
    leaves = flatten(trainer.abstract.params).items()
    return sum(
        4 * math.prod(p.shape) for path, p in leaves if path.startswith(below) and ("fsdp" in p.sharding.spec) == split
    )


@pytest.mark.parametrize("remat", ["none", pytest.param("dots", marks=pytest.mark.faults)])
def test_fully_sharded_weights_are_gathered_twice_and_gradients_scattered_once(remat):
    trainer, moved = compiled(fsdp=8, remat=remat)
    blocks = size(trainer, split=True, below="trunk/layers") * 7 / 8
    weights, rest = size(trainer, split=True) * 7 / 8, size(trainer, split=False)
    assert rest < weights / 20, "a test of the sharded ones"
    assert moved["reduce-scatter", ("fsdp",)] == weights
    # Once forward; those of the blocks are not kept, and gathered again.
    assert moved["all-gather", ("fsdp",)] == pytest.approx(weights + blocks, rel=0.01)
    assert sum(moved.values()) <= 1.15 * 3 * weights, moved


@pytest.mark.faults
def test_the_data_axis_adds_up_only_what_a_device_keeps():
    trainer, moved = compiled(data=2, fsdp=4)
    weights, rest = size(trainer, split=True), size(trainer, split=False)
    assert moved["reduce-scatter", ("fsdp",)] == weights * 3 / 4
    assert moved["all-reduce", ("data",)] <= 1.15 * (weights / 4)  # 2 F (n - 1) / n of a quarter, n = 2
    assert moved["all-reduce", ("data", "fsdp")] <= 1.15 * (2 * rest * 7 / 8)


@pytest.mark.faults
def test_data_parallel_devices_exchange_gradients_and_nothing_else():
    trainer, moved = compiled(data=8)
    assert set(moved) == {("all-reduce", ("data",))}
    gradients = size(trainer, split=False) * 2 * 7 / 8
    assert gradients <= moved["all-reduce", ("data",)] <= 1.02 * gradients


@pytest.mark.faults
def test_every_microbatch_gathers_and_scatters():
    trainer, moved = compiled(fsdp=8, accumulate=2)
    assert moved["reduce-scatter", ("fsdp",)] == 2 * size(trainer, split=True) * 7 / 8


LAYERS, LENGTH, WIDTH = 3, 26, 64


@pytest.mark.faults
def test_tensor_exchanges_activations_and_never_weights():
    _, moved = compiled(data=4, tensor=2)
    assert {kind for kind, axes in moved if "tensor" in axes} == {"all-reduce"}
    activations = 4 * (56 // 4) * LENGTH * WIDTH
    # Two products end in a sum forward; backward, those that begin with q, k, v, gate and up.
    assert moved["all-reduce", ("tensor",)] == pytest.approx(7 * LAYERS * activations, rel=0.1)


@pytest.mark.faults
def test_context_splits_the_places_and_exchanges_keys_and_values():
    _, moved = compiled(data=2, context=4)
    padded = -(-LENGTH // 4) * 4
    keys_and_values = LAYERS * 2 * 4 * (56 // 2) * padded * WIDTH * 3 / 4
    assert keys_and_values <= moved["all-gather", ("context",)] <= 2 * keys_and_values
