"""The step's arithmetic on a network of one number: what the average follows, and which noise each step draws."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from src.common.mesh.fsdp import Placement
from src.interfaces import Batch
from src.train import skip_nonfinite
from src.train.state import TrainState, first_state
from src.train.step import make_train_step
from tests.helpers.numbers import system_of

DECAY, LR = 0.75, 0.5
BATCH = {"t": Batch({})}


def config_of(*rules):
    config = {"accumulate": 1, "ema": {"decay": DECAY, "warmup": False}, "guard": {"spike": 0.0}}
    return ConfigDict(config | {"optim": {"lr_multipliers": (*rules, (".*", 1.0))}})


def noise(key):
    return 2 + jax.random.normal(key, ())


@pytest.fixture
def step(monkeypatch):
    """lr -> the jitted step of the loss w · noise."""

    def make(lr):
        system = system_of(monkeypatch, config_of(), lambda params, view, noise: params["w"] * noise, noise)
        return jax.jit(make_train_step(system, optax.sgd(lr), system.config, Placement({}, jnp.float32)))

    return make


def state_at(number, lr, seed=0):
    params, ema = {"w": jnp.asarray(3.0)}, {"w": jnp.asarray(-5.0)}
    extra = {"seed": jnp.uint32(seed), "guard": skip_nonfinite.new_guard()}
    return TrainState(jnp.asarray(number, jnp.int32), params, ema, optax.sgd(lr).init(params), extra)


def test_one_step_by_hand(step):
    """ema' = d · ema + (1 - d) · w', of the parameters after the update."""
    new, measured = step(LR)(state_at(4, LR), BATCH)
    noise = float(measured.terms["t/o/product"].total) / 3.0  # which is the gradient, too
    updated = 3.0 - LR * noise
    assert abs(noise) > 0.1
    np.testing.assert_allclose(new.params["w"], updated, rtol=1e-5)
    np.testing.assert_allclose(new.ema["w"], DECAY * -5.0 + (1 - DECAY) * updated, rtol=1e-5)
    assert int(new.step) == 5


def test_what_is_frozen_has_no_gradient_and_what_the_run_began_with_is_shown(monkeypatch):
    """w' = w - lr · still · teacher, with three parameters of which one is trained."""

    def product(params, view, noise):
        return params["trunk"]["w"] * params["trunk"]["still"] * params["teacher"]["w"]

    system = system_of(monkeypatch, config_of(("still", 0.0)), product, noise)
    params = {"trunk": {"w": jnp.asarray(3.0), "still": jnp.asarray(-2.0)}}
    optimizer = optax.partition(
        {"train": optax.sgd(LR), "frozen": optax.set_to_zero()}, {"trunk": {"w": "train", "still": "frozen"}}
    )
    state = first_state(params, optimizer, 0, lambda p: {"w": 2 * p["trunk"]["w"]})
    step = jax.jit(make_train_step(system, optimizer, system.config, Placement({}, jnp.float32)))
    new, measured = step(state, BATCH)
    np.testing.assert_allclose(new.params["trunk"]["w"], 3.0 - LR * -2.0 * 6.0, rtol=1e-6)
    assert (new.params["trunk"]["still"], new.ema["trunk"]["still"], new.extra["teacher"]["w"]) == (-2, -2, 6)
    np.testing.assert_allclose(measured.squares["grad"]["trunk/w"], 144)
    assert measured.squares["grad"].keys() == {"trunk/w"} and measured.squares["update"]["trunk/still"] == 0


def test_noise_is_a_function_of_the_seed_and_the_step(step):
    """New noise in every step, which a resumed run draws again: with lr 0, the loss tells the noise apart."""
    still = step(0.0)
    loss = lambda number, seed=0: float(still(state_at(number, 0.0, seed), BATCH)[1].terms["total"].total)
    losses = [loss(0), loss(1), loss(2), loss(0, seed=1)]
    assert len(set(losses)) == 4
    after, _ = still(state_at(0, 0.0), BATCH)
    assert [float(still(after, BATCH)[1].terms["total"].total), loss(2)] == losses[1:3]
