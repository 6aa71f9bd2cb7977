"""The one step: accumulation, devices, exact resume, dead parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits, sit_digits
from src.build import build_system
from src.common.sharding import batch_sharding
from src.common.tree import flatten
from src.common.writers import Many
from src.train import loop
from src.train.checkpoint import Checkpointer
from src.train.trainer import make_trainer


def config_of(module=digits, variant="debug", **changes):
    config = module.get_config(variant)
    with config.unlocked():
        config.eval.evaluators = {}
        config.log.every = 1
        config.mesh.data = 1
        config.update_from_flattened_dict(changes)
    return config


class Recorder:
    """A writer that keeps the losses."""

    def __init__(self):
        self.losses = {}

    def write_scalars(self, step, scalars):
        self.losses[step] = {k: v for k, v in scalars.items() if k.startswith("loss") or k == "grad_norm"}


def run(folder, devices=1, **kwargs):
    """Trains and returns (state, losses by step)."""
    system = build_system(config_of(**kwargs))
    recorder = Recorder()
    checkpoints = Checkpointer(str(folder), every=system.config.checkpoint.every)
    trainer = make_trainer(system, jax.devices()[:devices])
    state, _ = loop.train(trainer, checkpoints, Many([recorder]), 0.0)
    checkpoints.close()
    return jax.device_get(state), recorder.losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"), steps=4)


def close(a, b, **tolerance):
    for (path, x), y in zip(flatten(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=path, **tolerance)


def test_two_and_two_resumed_steps_are_four_steps_bit_for_bit(straight, tmp_path):
    schedule = {"optim.steps": 4}
    run(tmp_path, steps=2, **schedule)
    state, losses = run(tmp_path, steps=4, **schedule)
    assert sorted(losses) == [3, 4], "the second run must go on, not start again"
    assert losses[4] == straight[1][4]
    jax.tree.map(np.testing.assert_array_equal, state, straight[0])


def test_accumulation_changes_memory_not_the_result(straight, tmp_path):
    state, losses = run(tmp_path, steps=4, accumulate=2)
    close(losses, straight[1], rtol=2e-4, atol=1e-5)
    close(state.ema, straight[0].ema, rtol=0, atol=2e-4)


def moved(config, steps=3):
    """Largest change of every tensor after some steps of Adam."""
    system = build_system(config)
    trainer = make_trainer(system, jax.devices()[:1])
    state = trainer.init()
    before = jax.device_get(flatten(state.params))
    step = trainer.compile()
    batch = {n: p.task.fake(p.rows, 0) for n, p in system.tasks.items()}
    with jax.set_mesh(trainer.mesh):
        for _ in range(steps):
            state, _ = step(state, jax.device_put(batch, batch_sharding(trainer.mesh)))
    return {path: float(jnp.abs(leaf - before[path]).max()) for path, leaf in flatten(state.params).items()}


@pytest.mark.parametrize("conditioning", ["TimeToken", "AdaLNBeforeTrunk", "AdditivePerLayer", "AdaLNPerLayer"])
def test_every_tensor_learns(conditioning):
    config = config_of()
    with config.unlocked():
        config.model.conditioning = {"name": f"conditioning:{conditioning}"}
        config.optim.weight_decay = 0.0
    dead = [path for path, change in moved(config).items() if change == 0]
    assert dead == []


def test_every_tensor_of_sit_learns():
    assert [path for path, change in moved(config_of(sit_digits)).items() if change == 0] == []


def test_the_official_time_token_is_dead():
    config = config_of(variant="official,debug")
    with config.unlocked():
        config.optim.weight_decay = 0.0
    dead = {path for path, change in moved(config).items() if change == 0}
    assert dead == {"conditioning/first/kernel", "conditioning/first/bias", "conditioning/second/kernel"}


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    with pytest.raises(FloatingPointError, match="became NaN or infinite between steps"):
        run(tmp_path, steps=8, **{"optim.lr": 1e15, "optim.warmup": 0, "checkpoint.every": 1})
    newest = Checkpointer(str(tmp_path))
    state, _, _ = newest.restore(make_trainer(build_system(config_of()), jax.devices()[:1]).abstract)
    newest.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_refusals():
    with pytest.raises(ValueError, match="do not divide over 8 = devices x accumulate"):
        make_trainer(build_system(config_of(**{"mesh.data": 8, "batch": 16})))
    with pytest.raises(ValueError, match=r"mesh \(data=3, fsdp=1\) does not fit 8 cpu devices"):
        make_trainer(build_system(config_of(**{"mesh.data": 3})))
