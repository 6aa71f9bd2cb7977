"""The optimizer against its formulas, by parameter path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from src.common import tree
from src.train.optim import OptimConfig, build_optimizer, build_schedule, ema_update

RNG = np.random.default_rng(0)
PARAMS = {
    "layers": {"kernel": RNG.normal(size=(2, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)},
    "vision": {"kernel": RNG.normal(size=4).astype(np.float32)},
}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(2)]
RULES = ConfigDict(
    {"lr": 0.1, "schedule": "linear", "warmup": 2, "steps": 4, "b1": 0.8, "b2": 0.9, "eps": 1e-3,
     "weight_decay": (("bias", 0.0), (".*", 0.3)), "multipliers": (("vision", 0.5), (".*", 1.0)), "max_norm": 1.5}
)  # fmt: skip


def run(optimizer, params=PARAMS, grads=GRADS):
    """Parameters and state after each gradient."""
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for grad in grads:
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state, updates


def by_hand(path, steps, c=RULES):
    """AdamW in float64 with the gradients clipped to the global norm of 1.5."""
    w, m, v = tree.flatten(PARAMS)[path].astype(np.float64), 0.0, 0.0
    decay, factor = 0.0 if "bias" in path else 0.3, 0.5 if "vision" in path else 1.0
    for step in range(steps):
        norm = np.sqrt(sum((g.astype(np.float64) ** 2).sum() for g in jax.tree.leaves(GRADS[step])))
        g = tree.flatten(GRADS[step])[path].astype(np.float64) * min(1.0, 1.5 / norm)
        m, v = c.b1 * m + (1 - c.b1) * g, c.b2 * v + (1 - c.b2) * g**2
        u = m / (1 - c.b1 ** (step + 1)) / (np.sqrt(v / (1 - c.b2 ** (step + 1))) + c.eps)
        w = w - (0.05, 0.1)[step] * factor * (u + decay * w)
    return w


def test_two_steps_equal_the_formulas():
    optimizer, schedule = build_optimizer(RULES, PARAMS)
    assert [float(schedule(i)) for i in range(2)] == pytest.approx([0.05, 0.1])
    for step, (params, _, _) in enumerate(run(optimizer), start=1):
        for path, value in tree.flatten(params).items():
            np.testing.assert_allclose(value, by_hand(path, step), rtol=2e-6, atol=1e-7, err_msg=path)


def test_frozen_parameters_have_no_state_and_no_part_in_the_norm():
    frozen = ConfigDict({**RULES, "multipliers": (("vision", 0.0), (".*", 1.0))})
    loud = [{**g, "vision": {"kernel": 1e6 * g["vision"]["kernel"]}} for g in GRADS]
    (_, (params, state, _)) = run(build_optimizer(frozen, PARAMS)[0], grads=loud)
    assert np.array_equal(params["vision"]["kernel"], PARAMS["vision"]["kernel"])
    assert not [path for path in tree.flatten(state) if "vision" in path]
    assert [path for path in tree.flatten(state) if "mu/layers/kernel" in path]
    alone = ConfigDict({**RULES, "multipliers": ((".*", 1.0),)})
    only = lambda t: {"layers": t["layers"]}
    (_, (expected, _, _)) = run(build_optimizer(alone, only(PARAMS))[0], only(PARAMS), [only(g) for g in GRADS])
    jax.tree.map(np.testing.assert_array_equal, only(params), expected)


def test_updates_and_moments_are_f32_for_half_gradients():
    optimizer, _ = build_optimizer({"max_norm": 1.0, "weight_decay": 0.1}, PARAMS)
    half = [jax.tree.map(lambda g: jnp.asarray(g, jnp.bfloat16), GRADS[0])]
    ((_, state, updates),) = run(optimizer, grads=half)
    moments = [x for path, x in tree.flatten(state).items() if "mu" in path or "nu" in path]
    assert {x.dtype for x in jax.tree.leaves(updates) + moments} == {jnp.dtype("float32")} and len(moments) == 6


def test_schedules():
    cosine = build_schedule(OptimConfig(2.0, "cosine", warmup=4, steps=12, final=0.1))
    assert [float(cosine(i)) for i in (0, 3, 4, 8, 12, 99)] == pytest.approx([0.5, 2.0, 2.0, 1.1, 0.2, 0.2])
    linear = build_schedule(OptimConfig(2.0, "linear", warmup=4, steps=12, final=0.1))
    assert [float(linear(i)) for i in (1, 4, 6, 12, 99)] == pytest.approx([1.0, 2.0, 1.55, 0.2, 0.2])
    constant = build_schedule(OptimConfig(2.0, warmup=4))
    assert [float(constant(i)) for i in (0, 3, 99)] == [0.5, 2.0, 2.0]
    assert [float(build_schedule(OptimConfig(2.0))(i)) for i in (0, 9)] == [2.0, 2.0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"weight_decay": (("bias", 0.1),)}, r"weight_decay's rules do not cover layers/kernel, vision/kernel"),
        ({"multipliers": (("text", 0.1), (".*", 1.0))}, r"multipliers' rules contain rules that decide nothing: text"),
        ({"multipliers": ((".*", 0.0),)}, "freezes every parameter"),
        ({"multipliers": ((".*", -1.0),)}, "negative"),
        ({"schedule": "cosine", "warmup": 10, "steps": 10}, "set optim.steps"),
        ({"schedule": "cosin"}, "'cosin' is unknown; there are: constant, cosine, linear"),
        ({"warmups": 1}, r"config's optim has no argument 'warmups' \(did you mean warmup\?\)"),
    ],
)
def test_a_config_that_means_nothing_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        build_optimizer(ConfigDict(config), PARAMS)


def test_moving_average():
    ema, params = {"a": jnp.float32(1.0)}, {"a": jnp.asarray(2.0, jnp.bfloat16)}
    assert float(ema_update(ema, params, 0.9999, 0)["a"]) == pytest.approx(1.0001, abs=6e-8)
    update = jax.jit(lambda step: ema_update(ema, params, 0.9999, step, warmup=True)["a"])
    assert [float(update(step)) for step in (0, 90, 10**7)] == pytest.approx([1.9, 1.09, 1.0001], rel=1e-6)
    assert update(0).dtype == jnp.float32
