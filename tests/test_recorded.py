"""Nothing moves: losses and rows of the first steps, every config's parameters, and checkpoints of format 2."""

import shutil

import jax
import pytest

from src.build import build_system
from src.common.runtime.writers import Many
from src.models.pretrained.old_paths import path_now
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.trainer import make_trainer
from tests.helpers import recorded
from tests.helpers.runs import Recorder

LONG = [pytest.param(name, marks=pytest.mark.faults) for name in recorded.RUNS[1:]]


@pytest.mark.parametrize("name", [recorded.RUNS[0], *LONG])
def test_the_first_losses_and_rows_are_those_that_were_recorded(name):
    found = recorded.losses(name)
    for now, before in zip(found["rows"], recorded.read("rows")[name], strict=True):
        assert {path: now[path] for path in before} == before
    for now, before in zip(found["losses"], recorded.read("losses")[name], strict=True):
        assert now == pytest.approx(before, rel=2e-5)


@pytest.mark.parametrize("name, variant", recorded.FORMS)
def test_the_parameters_of_a_config_are_those_that_were_recorded(name, variant):
    before = recorded.read("parameters")[f"{name}:{variant}"]
    assert recorded.shapes(name, variant) == {path_now(path): shape for path, shape in before.items()}


@pytest.mark.faults
@pytest.mark.parametrize("name", ["digits", pytest.param("sit_digits", marks=pytest.mark.faults)])
def test_a_checkpoint_of_format_2_goes_on_as_it_did_then(name, tmp_path):
    shutil.copytree(recorded.FOLDER / "format_2" / name, tmp_path, dirs_exist_ok=True)
    config, recorder = recorded.config_of(name), Recorder()
    with config.unlocked():
        config.optim.steps = 8
    trainer = make_trainer(build_system(config), jax.devices()[:1])
    checkpoints = Checkpointer(str(tmp_path), **config.checkpoint)
    loop.train(trainer, checkpoints, Many([recorder]), 0.0)
    checkpoints.close()
    for step, before in recorded.read("resumed")[name].items():
        before = {path.replace("/nats", "/nll"): value for path, value in before.items()}
        assert recorder.losses[int(step)] == pytest.approx(before, rel=2e-5)
    assert len(recorder.losses) == 4
