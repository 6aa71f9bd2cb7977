"""Muon against the singular values of its updates, on real parameters, on a mesh, and in a run that resumes."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import digits, sit_digits
from src.build import build_system
from src.common import tree
from src.common.mesh.sharding import ShardingRules, make_mesh
from src.common.runtime.writers import Many
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config
from src.train.loop import ELASTIC
from src.train.optim import OptimConfig, build_optimizer
from src.train.trainer import make_trainer
from tests.helpers.runs import Recorder, config_of

RNG = np.random.default_rng(0)
UP, DOWN, BIAS, HEAD = (
    f"{place}/{leaf}"
    for place, leaf in (
        ("trunk/layers/mlp/up", "kernel"),
        ("trunk/layers/mlp/down", "kernel"),
        ("trunk/layers/mlp/up", "bias"),
        ("fields/text/head/linear", "kernel"),
    )
)
SHAPES = {UP: (2, 6, 9), DOWN: (2, 9, 6), BIAS: (2, 9), HEAD: (6, 13)}
PARAMS = tree.unflatten({path: RNG.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()})
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(2)]


MUON = [f"optim.muon.{option}" for option in ("targets", "momentum", "steps", "rms")]


def orthogonal(h, steps=5):
    """What Newton-Schulz makes of one matrix, computed on its singular values, in float64."""
    u, s, vt = np.linalg.svd(h, full_matrices=False)
    s = s / np.linalg.norm(h)
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    assert (s > 0.6).all() and (s < 1.3).all()
    return (u * s) @ vt


def by_hand(path, lr=0.1, b=0.9, rms=0.3, decay=0.2):
    """Two steps of Muon for each layer's matrix, in float64."""
    w, m = (x.astype(np.float64) for x in (tree.flatten(PARAMS)[path], np.zeros(SHAPES[path])))
    for step, grads in enumerate(GRADS, start=1):
        g = tree.flatten(grads)[path].astype(np.float64)
        m = b * m + (1 - b) * g
        h = b * m / (1 - b ** (step + 1)) + (1 - b) * g / (1 - b**step)
        u = rms * np.sqrt(9) * np.stack([orthogonal(layer) for layer in h])
        w = w - lr * (0.5 if path == DOWN else 1.0) * (u + decay * w)
    return w


def walk(optimizer, params=PARAMS, grads=GRADS):
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
    return tree.flatten(params), tree.flatten(state)


def test_two_steps_equal_the_singular_value_decomposition():
    """Layer by layer, with decay and multipliers; what is no matrix of the trunk is updated as by AdamW alone."""
    shared = {"lr": 0.1, "b1": 0.8, "lr_multipliers": (("down", 0.5), (".*", 1.0)), "weight_decay": 0.2}
    muon = {"momentum": 0.9, "rms": 0.3}
    found, state = walk(build_optimizer(shared | {"method": "muon", "muon": muon}, PARAMS)[0])
    adamw, _ = walk(build_optimizer(shared, PARAMS)[0])
    for path in (UP, DOWN):
        np.testing.assert_allclose(found[path], by_hand(path), rtol=0, atol=3e-6, err_msg=path)
    for path in (BIAS, HEAD):
        np.testing.assert_array_equal(found[path], adamw[path], err_msg=path)
    kept = {path: sum(key.endswith(path) for key in state) for path in SHAPES}
    assert kept == {UP: 1, DOWN: 1, BIAS: 2, HEAD: 2}, "a matrix has one momentum, the others m and v"


def test_frozen_matrices_stay_and_have_no_state():
    frozen = {"method": "muon", "lr": 0.1, "lr_multipliers": (("up", 0.0), (".*", 1.0)), "grad_clip": 1.0}
    found, state = walk(build_optimizer(frozen, PARAMS)[0])
    for path in (UP, BIAS):
        np.testing.assert_array_equal(found[path], tree.flatten(PARAMS)[path])
        assert not [key for key in state if key.endswith(path)]
    assert not np.array_equal(found[DOWN], tree.flatten(PARAMS)[DOWN])


def test_which_parameters_of_the_configs_are_matrices():
    """Every kernel of attention and mlp, of stacks of layers; nothing that embeds, conditions, normalizes or reads out.
    The momentum is all that they keep."""
    for module, moments, size in ((digits, "full", 4), (sit_digits, "bfloat16", 2), (digits, "factored", 2)):
        shapes = jax.eval_shape(build_system(config_of(module, "")).init, jax.random.key(0))
        optimizer, _ = build_optimizer(OptimConfig(method="muon", moments=moments), shapes)
        state = tree.flatten(jax.eval_shape(optimizer.init, shapes))
        own = {key.partition("/mu/")[2]: leaf for key, leaf in state.items() if "/muon/" in key and "/mu/" in key}
        wanted = {p for p in tree.flatten(shapes) if p.endswith("/kernel") and ("/attention/" in p or "/mlp/" in p)}
        assert own.keys() == wanted and len(wanted) in (6, 7), module.__name__
        assert all(leaf.ndim == 3 and leaf.dtype.itemsize == size for leaf in own.values())
        assert not any(key.endswith(path) and "/muon/" not in key for key in state for path in wanted)


def test_the_update_on_a_mesh_is_that_of_one_device():
    """Momenta lie as their parameters do; a matrix that is split is made orthogonal as a whole."""
    shapes = {UP: (3, 8, 16), HEAD: (8, 10)}
    rng = np.random.default_rng(1)
    params, grads = (
        tree.unflatten({path: jnp.asarray(rng.normal(size=s), jnp.float32) for path, s in shapes.items()})
        for _ in range(2)
    )
    optimizer, _ = build_optimizer({"method": "muon", "muon": {"steps": 2}, "grad_clip": 1.0}, params)
    alone, _ = optimizer.update(grads, optimizer.init(params), params)
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rules = ShardingRules(**digits.get_config().sharding.to_dict() | {"min_size": 1})
    place = lambda x: jax.device_put(x, rules.shardings(x, mesh))
    state = place(optimizer.init(params))
    momentum = next(leaf for key, leaf in tree.flatten(state).items() if key.endswith(f"mu/{UP}"))
    assert momentum.sharding.spec == jax.sharding.PartitionSpec(None, "fsdp", "tensor")
    found, _ = jax.jit(optimizer.update)(place(grads), state, place(params))
    for path, value in tree.flatten(found).items():
        np.testing.assert_allclose(value, tree.flatten(alone)[path], rtol=0, atol=2e-6, err_msg=path)


@pytest.mark.faults
def test_a_run_resumes_bit_for_bit(tmp_path):
    """Two steps and two more from their checkpoint are four."""
    config = config_of(**{"optim.method": "muon", "optim.lr": 1e-2, "steps": 4})
    with config.unlocked():
        del config.tasks["number_sentences"], config.tasks["image_to_caption"]
    trainer = make_trainer(build_system(config), jax.devices()[:1])
    step = trainer.compile()
    trainer.compile = lambda: step

    def run(folder, last=None):
        recorder = Recorder(last)
        with contextlib.closing(Checkpointer(folder, every=2)) as checkpoints, contextlib.suppress(KeyboardInterrupt):
            state, _ = loop.train(trainer, checkpoints, Many([recorder]), 0.0)
            return recorder.losses, jax.device_get(state)
        return recorder.losses, None

    losses, whole = run(tmp_path / "whole")
    first, _ = run(tmp_path / "parts", last=3)
    rest, parts = run(tmp_path / "parts")
    assert min(rest) == 3 and first | rest == losses
    jax.tree.map(np.testing.assert_array_equal, whole, parts)


def test_a_checkpoint_of_another_method_is_refused_in_words():
    old, new = digits.get_config("debug"), digits.get_config("debug")
    new.optim.method = "muon"
    with pytest.raises(ValueError, match=r"optim\.method: 'adamw' -> 'muon'\): .*--config\.optim\.method=adamw;"):
        check_config(old.to_dict(), new.to_dict(), ELASTIC)
    old = old.to_dict()
    del old["optim"]["method"], old["optim"]["muon"]  # before there was a choice
    assert check_config(old, digits.get_config("debug").to_dict(), ELASTIC).keys() <= {"optim.method", *MUON}


@pytest.mark.parametrize(
    ("optim", "words"),
    [
        ({"method": "lion"}, "'lion' is unknown; there are: adamw, muon"),
        ({"muon": {"momentun": 0.9}}, r"optim.muon has no argument 'momentun' \(did you mean momentum\?\)"),
        ({"muon": {"steps": 0}}, "steps at least 1"),
        ({"muon": {"rms": "0.2"}}, "rms='0.2'; it must be a number"),
        ({"muon": {"targets": "("}}, "no regular expression"),
        ({"muon": {"targets": ".*/bias"}}, f"matches {BIAS}, no matrices"),
        ({"muon": {"targets": "trunk/kernel"}}, "matches no trained parameter"),
        ({"lr_multipliers": (("trunk", 0.0), (".*", 1.0))}, "matches no trained parameter"),
    ],
)
def test_options_that_mean_nothing_are_refused(optim, words):
    with pytest.raises(ValueError, match=words):
        build_optimizer({"method": "muon"} | optim, PARAMS)
