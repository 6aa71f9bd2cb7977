"""The one step: accumulation, devices, exact resume, tensors that learn."""

import contextlib
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.build import build_system
from src.common.mesh.sharding import batch_sharding
from src.common.runtime.writers import JsonLinesWriter, Many
from src.common.tree import flatten
from src.interfaces import LossTerm
from src.train import loop, skip_nonfinite
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.metrics import CLOCK, Metrics
from src.train.nonfinite.locate import NonfiniteLocator
from src.train.step import StepMetrics
from src.train.trainer import make_trainer
from tests.helpers.numbers import bare
from tests.helpers.runs import Recorder, close, config_of, logged


def run(folder, devices=1, last=None, **kwargs):
    """Trains and returns (state, losses by step)."""
    system = build_system(config_of(**kwargs))
    recorder, log = Recorder(last), JsonLinesWriter(folder / "log.jsonl")
    checkpoints = Checkpointer(str(folder), every=system.config.checkpoint.every)
    trainer = make_trainer(system, jax.devices()[:devices])
    with contextlib.closing(checkpoints):
        state, _ = loop.train(trainer, checkpoints, Many([log, recorder]), 0.0)
    return jax.device_get(state), recorder.losses


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    return *run(folder, steps=4), logged(folder)


def test_a_run_cut_off_after_a_save_ends_as_one_that_was_not_bit_for_bit(straight, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=4, last=3, **{"checkpoint.every": 2})
    with open(tmp_path / "log.jsonl", "a") as file:
        assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3], "one more than was saved"
        file.write('{"step": 4, "lo')
    state, losses = run(tmp_path, steps=4, **{"checkpoint.every": 2})
    assert sorted(losses) == [3, 4], "the second run must go on, not start again"
    jax.tree.map(np.testing.assert_array_equal, state, straight[0])
    assert logged(tmp_path) == straight[2] and len(straight[2]) == 4


def test_means_of_a_log_line_do_not_feel_a_save_between_two_lines():
    system = bare()
    rows = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32) * 1e3

    def told(cuts):
        meter = Metrics(system, lambda step: 0.0)
        for at, row in enumerate(rows):
            if at in cuts:
                state = json.loads(json.dumps(meter.get_state(at)))
                meter = Metrics(system, lambda step: 0.0)
                meter.set_state(state)
            terms = {"total": LossTerm(row[0], np.float32(1)), "a": LossTerm(row[1], np.abs(row[0]))}
            meter.add(StepMetrics(terms, {}, skip_nonfinite.new_guard()))
        return {k: v for k, v in meter.flush(7).items() if k not in CLOCK}

    assert told(()) == told((3,)) == told((1, 2, 6))
    assert told(())["loss"] == pytest.approx(rows[:, 0].astype(np.float64).mean())
    spoilt = Metrics(system, lambda step: 0.0)
    spoilt.add(StepMetrics({"update_norm": LossTerm(np.float32("nan"), np.float32(1))}, {}, skip_nonfinite.new_guard()))
    with pytest.raises(FloatingPointError, match="an update became infinite between steps 4 and 5"):
        spoilt.get_state(5)


@pytest.mark.faults
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


CONDITIONINGS = ("TimeToken", "AdaLNPerLayer", "AdaLNBeforeTrunk", "AdditivePerLayer")


@pytest.mark.faults
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_tensor_learns(conditioning):
    config = config_of()
    with config.unlocked():
        config.model.conditioning = {"name": f"conditioning:{conditioning}"}
        config.optim.weight_decay = 0.0
    dead = [path for path, change in moved(config).items() if change == 0]
    assert dead == []


@pytest.mark.faults  # the suite has test_guard.py
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(NonfiniteLocator, "locate", lambda *_: "a place")  # test_guard.py tests the search
    huge = {"optim.lr": 1e15, "optim.warmup": 0, "checkpoint.every": 1, "guard.patience": 3}
    with pytest.raises(FloatingPointError, match=r"step 4 is the last of 3 skipped steps in a row.*in a place"):
        run(tmp_path, steps=8, **huge)
    newest = Checkpointer(str(tmp_path))
    state, _, _ = newest.restore(make_trainer(build_system(config_of()), jax.devices()[:1]).abstract)
    newest.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_refusals():
    with pytest.raises(ValueError, match="do not divide over 8 = devices x accumulate"):
        make_trainer(build_system(config_of(**{"mesh.data": 8, "batch": 16})))
    with pytest.raises(ValueError, match=r"mesh \(data=3, fsdp=1\) does not fit 8 cpu devices"):
        make_trainer(build_system(config_of(**{"mesh.data": 3})))
