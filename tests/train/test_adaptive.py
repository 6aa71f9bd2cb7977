"""The state of an adaptive process: it learns from the losses of its field, whatever the microbatches and devices."""

import jax
import numpy as np
import pytest

from configs import sit_digits
from src.build import build_system
from src.train.trainer import make_trainer, open_data

STEPS = 2


def run(devices=1, process="Remembering", **changes):
    """The state after some steps, and the losses that were logged."""
    config = sit_digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators = {}
        config.mesh.data = devices
        config.fields.image.process.name = f"tests.helpers.adaptive:{process}"
        config.update_from_flattened_dict(changes)
    trainer = make_trainer(build_system(config), jax.devices()[:devices])
    state, data, step, losses = trainer.init(), open_data(trainer), trainer.compile(), []
    with jax.set_mesh(trainer.mesh):
        for number in range(STEPS):
            state, measured = step(state, trainer.place(next(data), number))
            losses.append(measured.terms["label_to_image/diffusion/mse"])
    data.close()
    assert not [name for name in measured.terms if "statistics" in name]
    return jax.device_get(state.extra["states"]["image"]), jax.device_get(losses)


@pytest.mark.parametrize(
    "how",
    [
        {},
        pytest.param({"accumulate": 2}, marks=pytest.mark.faults),
        pytest.param({"devices": 2}, marks=pytest.mark.faults),
        pytest.param({"accumulate": 2, "devices": 2}, marks=pytest.mark.faults),
    ],
    ids=str,
)
def test_a_process_is_told_every_loss_once(how):
    state, losses = run(**how)
    assert state["count"].sum() == sum(term.count for term in losses) == STEPS * 64 * 16
    np.testing.assert_allclose(state["total"].sum(), sum(term.total for term in losses), rtol=1e-5)
    assert (state["count"] > 0).sum() > 8, "times spread over the bins"


@pytest.mark.faults
def test_a_large_state_with_whole_numbers_is_the_same_over_fsdp():
    """Every device reads all of it, also where it is as large as parameters that are cut."""
    alone, cut = (
        run(process="Large", devices=n, **{"mesh.data": 1, "mesh.fsdp": n, "sharding.min_size": 1}) for n in (1, 2)
    )
    assert alone[0]["updates"] == cut[0]["updates"] == STEPS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), alone, cut)
