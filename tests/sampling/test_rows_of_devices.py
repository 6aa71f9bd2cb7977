"""Rows are split over the devices: in the compiled program each has its own, and hears nothing of the others."""

import re

import jax
import pytest

from configs import digits, latentlm_digits, showo_digits
from src.build import build_system
from src.tools.compile.hlo import collectives
from src.train.trainer import make_trainer

DEVICES, EACH = 8, 13  # rows of a device: no size of the model


def program(config, task, **mesh):
    """The text of the guided sampler's program of one device for eight times 13 rows."""
    with config.unlocked():
        config.sample.batch_size = DEVICES * EACH
        config.eval.evaluators = {}
        config.mesh.update(mesh)
    system = build_system(config)
    trainer = make_trainer(system, jax.devices()[:DEVICES])
    pipeline = system.pipeline.with_params(trainer.abstract.params)
    given = system.tasks[task].task.questions(4, "train")
    return pipeline.lower(task, given, scale=2.0, guided=True).compile().as_text(), dict(trainer.mesh.shape)


@pytest.mark.parametrize(
    "config, task",
    [
        (digits, "caption_to_image"),
        (digits, "number_sentences"),
        pytest.param(digits, "image_to_caption", marks=pytest.mark.faults),
        pytest.param(showo_digits, "caption_to_image", marks=pytest.mark.faults),
        pytest.param(latentlm_digits, "caption_to_image", marks=pytest.mark.faults),
    ],
)
def test_each_device_computes_its_own_rows_alone(config, task):
    text, shape = program(config.get_config("debug"), task)
    sizes = {int(size) for dims in re.findall(r"\w+\[([\d,]+)\]", text) for size in dims.split(",")}
    assert {EACH, 2 * EACH} <= sizes, "each row with its conditions and without"
    assert DEVICES * EACH not in sizes, "all rows are nowhere"
    assert not collectives(text, shape)


def test_rows_are_split_over_the_devices_of_fsdp_too():
    text, _ = program(digits.get_config("debug"), "caption_to_image", data=2, fsdp=4)
    sizes = {int(size) for dims in re.findall(r"\w+\[([\d,]+)\]", text) for size in dims.split(",")}
    assert EACH in sizes and DEVICES * EACH not in sizes
