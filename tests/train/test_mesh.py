"""One config on any mesh: the same losses and the same updated weights."""

import itertools
import math

import jax
import pytest

from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.train.trainer import make_trainer, open_data
from tests.helpers.runs import close, config_of

EVERY = [m for m in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(m) == 8]
# With the microbatches below, every axis with each other one but data with context; the rest is
# `pytest -m every_mesh tests/train/test_mesh.py`.
CHOSEN = [(1, 2, 2, 2)]
STEPS = 3


def train(mesh, **changes):
    """Losses and gradient norm of each step, then parameters and their average, on a mesh of that shape."""
    sizes = dict(zip(("data", "fsdp", "tensor", "context"), mesh, strict=True))
    changes = {"sharding.min_size": 1, "model.trunk.kv_heads": 2, "fields.text.codec.vocab_size": 200} | changes
    config = config_of(**{f"mesh.{axis}": size for axis, size in sizes.items()} | changes)
    with config.unlocked():
        config.batch = 112
        del config.tasks["number_sentences"]  # one row length compiles twice as fast
    system = build_system(config)
    trainer = make_trainer(system, jax.devices()[: math.prod(mesh)])
    state, step, data = trainer.init(), trainer.compile(), open_data(trainer)
    measured = []
    with jax.set_mesh(trainer.mesh):
        for _ in range(STEPS):
            state, found = step(state, put_batch(next(data), trainer.mesh))
            found = {k: v.total for k, v in found.terms.items() if k != "update_norm"}  # Adam magnifies roundings
            measured.append(found)
    data.close()
    return jax.device_get(measured), jax.device_get((state.params, state.ema)), trainer


@pytest.fixture(scope="module")
def alone():
    return train((1, 1, 1, 1))


@pytest.mark.parametrize(
    "mesh", [m if m in CHOSEN else pytest.param(m, marks=pytest.mark.every_mesh) for m in EVERY], ids=str
)
def test_any_mesh_of_eight_devices_does_what_one_device_does(alone, mesh):
    measured, weights, _ = train(mesh)
    close(measured, alone[0], rtol=2e-4, atol=1e-5)
    close(weights, alone[1], rtol=0, atol=2e-4)


@pytest.mark.faults
def test_a_tied_head_on_a_mesh():
    """One table, read as rows by the embedder and as columns by the head, both with gradients."""
    tied = {"fields.text.head.tied": True}
    (measured, weights, _), (alone, wanted, _) = train((1, 2, 2, 2), **tied), train((1, 1, 1, 1), **tied)
    close(measured, alone, rtol=2e-4, atol=1e-5)
    close(weights, wanted, rtol=0, atol=2e-4)
    assert "kernel" not in str(weights[0]["fields"]["text"].get("head", ""))


@pytest.mark.faults
def test_microbatches_on_a_mesh(alone):
    """Counts are of all rows, of the microbatches and of the devices."""
    measured, weights, _ = train((2, 2, 2, 1), **{"accumulate": 2, "model.trunk.remat": "dots"})
    close(measured, alone[0], rtol=2e-4, atol=1e-5)
    close(weights, alone[1], rtol=0, atol=2e-4)
