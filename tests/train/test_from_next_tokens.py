"""Diffusion of text begins from the weights of a model of next tokens: rows for the masks are new, all else is read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import text_blocks
from src.build import build_system
from src.common.files.lazy_arrays import LazyArrays
from src.common.tree import flatten
from src.evals.language.likelihood import log_likelihoods
from src.evals.language.network import TextNetwork
from src.models.pretrained.initial_weights import write_initial
from src.train.trainer import make_trainer

TABLE = "fields/text/embed/table/embedding"


def config_with(path="", **changes):
    config = text_blocks.get_config("debug").unlock()
    config.fields.text.codec = {"name": "text:Bytes"}
    for task in config.tasks.values():
        task.template.length = 80
    config.batch, config.init_from.path = 8, str(path)
    config.update_from_flattened_dict(changes)
    return config


def next_tokens():
    """The same system without diffusion."""
    config = config_with()
    del config.fields.text.process, config.fields.text.step, config.fields.text.timed
    config.decode.text = {"name": "left_to_right"}
    for task in config.tasks.values():
        del task.objectives.noise, task.template.segment
    config.eval.evaluators = {}
    return build_system(config.lock())


@pytest.mark.faults
def test_a_model_of_next_tokens_goes_on_as_a_model_of_blocks(tmp_path):
    before = next_tokens()
    start = jax.jit(before.init)(jax.random.key(3))
    write_initial(tmp_path / "start", LazyArrays(flatten(start)), {})
    system = build_system(config_with(tmp_path / "start").lock())
    trainer = make_trainer(system, jax.devices()[:2])
    params, old = flatten(trainer.init().params), flatten(start)
    assert params.keys() == old.keys(), "untimed diffusion brings no parameters but the rows of masks"
    rows = old[TABLE].shape[0]
    assert params[TABLE].shape[0] == rows + 1 == system.fields["text"].process.ids
    for path, leaf in old.items():
        np.testing.assert_array_equal(params[path][:rows] if path == TABLE else params[path], leaf)
    new = np.asarray(params[TABLE][rows])
    assert new.any() and np.abs(new - old[TABLE]).max(axis=1).min() > 0, "no copy of a word"
    pairs = [([1, 40, 50], [60, 70, 80, 90])]
    ways = [(before, start), (system, trainer.init().params)]
    found = [
        log_likelihoods(TextNetwork(s.architecture.bind, s.fields["text"], p, jnp.float32, 80), pairs)[0][0]
        for s, p in ways
    ]
    assert found[0] == pytest.approx(found[1], abs=1e-5)


def test_other_numbers_of_rows_are_refused(tmp_path):
    start = flatten(jax.jit(next_tokens().init)(jax.random.key(3)))
    start[TABLE] = start[TABLE][:-3]
    write_initial(tmp_path / "start", LazyArrays(start), {})
    trainer = make_trainer(build_system(config_with(tmp_path / "start").lock()), jax.devices()[:1])
    with pytest.raises(ValueError, match=f"{TABLE} is .* there and .* here"):
        trainer.init()
