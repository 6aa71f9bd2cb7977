"""The optimizer against its formulas, by parameter path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import digits, imagenet256
from src.build import build_system
from src.common import tree
from src.common.mesh.sharding import ShardingRules, make_mesh
from src.train.checkpoints.config_changes import check_config
from src.train.loop import ELASTIC
from src.train.optim import MOMENTS, OptimConfig, build_optimizer, build_schedule, ema_update, rate_change
from tests.helpers.runs import config_of

RNG = np.random.default_rng(0)
PARAMS = {
    "layers": {"kernel": RNG.normal(size=(2, 3)).astype(np.float32), "bias": RNG.normal(size=3).astype(np.float32)},
    "vision": {"kernel": RNG.normal(size=4).astype(np.float32)},
}
GRADS = [jax.tree.map(lambda x: RNG.normal(size=x.shape).astype(np.float32), PARAMS) for _ in range(2)]
RULES = ConfigDict(
    {"lr": 0.1, "schedule": "linear", "warmup": 2, "steps": 4, "b1": 0.8, "b2": 0.9, "eps": 1e-3,
     "weight_decay": (("bias", 0.0), (".*", 0.3)), "lr_multipliers": (("vision", 0.5), (".*", 1.0)), "grad_clip": 1.5}
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


def test_rules_of_decay_go_before_the_decay_of_the_rest():
    """As a config says it, where `weight_decay` is a number."""
    config = digits.get_config().optim
    config.update({k: v for k, v in RULES.items() if k != "weight_decay"} | {"weight_decay": 0.3})
    config.decays = (("bias", 0.0),)
    for step, (params, _, _) in enumerate(run(build_optimizer(config, PARAMS)[0]), start=1):
        for path, value in tree.flatten(params).items():
            np.testing.assert_allclose(value, by_hand(path, step), rtol=2e-6, atol=1e-7, err_msg=path)
    config.decays = ((".*", 0.0),)
    build_optimizer(config, PARAMS)  # nothing is left for `weight_decay`
    config.decays = (("text", 0.0),)
    with pytest.raises(ValueError, match=r"decays' rules contain rules that decide nothing: text"):
        build_optimizer(config, PARAMS)


def test_frozen_parameters_have_no_state_and_no_part_in_the_norm():
    frozen = ConfigDict({**RULES, "lr_multipliers": (("vision", 0.0), (".*", 1.0))})
    loud = [{**g, "vision": {"kernel": 1e6 * g["vision"]["kernel"]}} for g in GRADS]
    (_, (params, state, _)) = run(build_optimizer(frozen, PARAMS)[0], grads=loud)
    assert np.array_equal(params["vision"]["kernel"], PARAMS["vision"]["kernel"])
    assert not [path for path in tree.flatten(state) if "vision" in path]
    assert [path for path in tree.flatten(state) if "mu/layers/kernel" in path]
    alone = ConfigDict({**RULES, "lr_multipliers": ((".*", 1.0),)})
    only = lambda t: {"layers": t["layers"]}
    (_, (expected, _, _)) = run(build_optimizer(alone, only(PARAMS))[0], only(PARAMS), [only(g) for g in GRADS])
    jax.tree.map(np.testing.assert_array_equal, only(params), expected)


def test_updates_and_moments_are_f32_for_half_gradients():
    optimizer, _ = build_optimizer({"grad_clip": 1.0, "weight_decay": 0.1}, PARAMS)
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
        (
            {"lr_multipliers": (("text", 0.1), (".*", 1.0))},
            r"multipliers' rules contain rules that decide nothing: text",
        ),
        ({"lr_multipliers": ((".*", 0.0),)}, "freezes every parameter"),
        ({"lr_multipliers": ((".*", -1.0),)}, "negative"),
        ({"schedule": "cosine", "warmup": 10, "steps": 10}, "set optim.steps"),
        ({"schedule": "cosin"}, "'cosin' is unknown; there are: constant, cosine, linear"),
        ({"decays": (("(", 0.0),)}, "decays has a rule that is no regular expression"),
        ({"moments": "half"}, "'half' is unknown; there are: full, bfloat16, factored"),
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


def state_bytes(shapes, **changes):
    optimizer, _ = build_optimizer(OptimConfig(**changes), shapes)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(optimizer.init, shapes)))


def test_bytes_of_state_and_where_they_lie():
    """Of the digits' model (no axis of 128: only m shrinks, v stays whole) and of the published size."""
    small, large = (
        jax.eval_shape(build_system(config_of(module, "")).init, jax.random.key(0)) for module in (digits, imagenet256)
    )
    for shapes, most in ((small, 6.001), (large, 2.01)):
        count = tree.count_parameters(shapes)
        kinds = {kind: state_bytes(shapes, moments=kind) / count for kind in MOMENTS}
        assert kinds["full"] == pytest.approx(8, abs=0.01) and kinds["bfloat16"] == pytest.approx(6, abs=0.01)
        assert 2 < kinds["factored"] < most
    state = jax.eval_shape(build_optimizer(OptimConfig(moments="factored"), large)[0].init, large)
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = tree.flatten(ShardingRules(**imagenet256.get_config().sharding).shardings(state, mesh))
    for path, leaf in tree.flatten(state).items():
        own = placed[path].shard_shape(leaf.shape)  # raises where an axis does not divide
        assert "layers" not in path or not leaf.ndim or own[0] == leaf.shape[0], path
    split = [p for p, leaf in tree.flatten(state).items() if "v_" in p and not placed[p].is_fully_replicated]
    assert any("v_col/trunk/layers/mlp" in p for p in split), "no factor is large enough to be split"


@pytest.mark.parametrize("kind, dtypes", [("full", "float32"), ("bfloat16", "bfloat16"), ("factored", "bfloat16")])
def test_every_kind_of_moments_learns_clips_and_freezes(kind, dtypes):
    rng = np.random.default_rng(0)
    x, target = rng.normal(size=(64, 128)), rng.normal(size=(64, 130))
    params = {"w": jnp.zeros((128, 130)), "b": jnp.zeros(130), "still": jnp.ones((128, 130))}
    config = {"lr": 3e-3, "moments": kind, "grad_clip": 1.0, "lr_multipliers": (("still", 0.0), (".*", 1.0))}
    optimizer, _ = build_optimizer(config, params)

    def loss(p):
        return jnp.mean((x @ (p["w"] * p["still"]) + p["b"] - target) ** 2)

    @jax.jit
    def step(carry, _):
        params, state = carry
        updates, state = optimizer.update(jax.tree.map(lambda g: 1e6 * g, jax.grad(loss)(params)), state, params)
        return (optax.apply_updates(params, updates), state), loss(params)

    (after, state), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=30)
    assert losses[-1] < 0.5 * losses[0] and np.isfinite(losses).all()
    np.testing.assert_array_equal(after["still"], params["still"])
    flat = tree.flatten(state)
    assert not [path for path in flat if "still" in path]
    (momentum,) = [x for path, x in flat.items() if path.endswith("mu/w") or path.endswith("ema/w")]
    assert momentum.dtype == dtypes
    others = {x.dtype for path, x in flat.items() if "mu/" not in path and "ema/" not in path}
    assert others == {jnp.dtype("float32"), jnp.dtype("int32")}
    if kind == "factored":
        shapes = {path.split("/")[-2]: x.shape for path, x in flat.items() if path.endswith("/w")}
        assert shapes == {"v_row": (128,), "v_col": (130,), "v": (1,), "ema": (128, 130)}


def test_factored_step_equals_the_formulas():
    """Two steps of Adafactor with momentum, in float64."""
    rng = np.random.default_rng(0)
    w, grads = np.zeros((128, 129)), rng.normal(size=(2, 128, 129)) * np.exp(rng.normal(size=(128, 1)))
    config = OptimConfig(lr=0.1, b1=0.5, b2=0.4, moments="factored")
    params = {"w": jnp.zeros((128, 129))}
    steps = list(run(build_optimizer(config, params)[0], params, [{"w": jnp.asarray(g, jnp.float32)} for g in grads]))
    row, column, m, rounded = 0.0, 0.0, 0.0, 0.0
    for step, (g, (after, _, _)) in enumerate(zip(grads, steps, strict=True)):
        decay = min(0.4, 1 - (step + 1) ** -0.8)
        row = decay * row + (1 - decay) * (g**2).mean(1)
        column = decay * column + (1 - decay) * (g**2).mean(0)
        u = g / np.sqrt(np.outer(row, column) / row.mean())
        m = 0.5 * m + 0.5 * u / max(1.0, np.sqrt((u**2).mean()))
        w = w - 0.1 * m
        # The second step reads the first one's momentum, which was rounded to 8 bits.
        np.testing.assert_allclose(after["w"], w, rtol=0, atol=(2e-7, 2**-8 * 0.1 * 0.5 * rounded)[step])
        rounded = abs(m).max()


def test_a_checkpoint_with_other_moments_is_refused_in_words():
    old, new = digits.get_config("debug"), digits.get_config("debug")
    new.optim.moments = "factored"
    with pytest.raises(ValueError, match=r"optim\.moments: 'full' -> 'factored'\): .*--config\.optim\.moments=full;"):
        check_config(old.to_dict(), new.to_dict(), ELASTIC)


def _run(steps, end=0, **optim):
    settings = {"lr": 1e-3, "schedule": "cosine", "warmup": 0, "steps": end, "final": 0.0}
    return {"steps": steps, "optim": settings | optim}


@pytest.mark.parametrize(
    ("old", "new", "step", "said"),
    [
        (_run(6), _run(12), 6, "goes from 0 to 0.0005 at step 6; to keep the schedule, add --config.optim.steps=6"),
        (_run(12), _run(8), 6, "from 0.0005 to 0.0001464 at step 6; to keep the schedule, add --config.optim.steps=12"),
        (_run(10, schedule="linear"), _run(20, schedule="linear"), 5, "goes from 0.0005 to 0.00075 at step 5;"),
        (_run(10, schedule="linear", final=0.1), _run(20, schedule="linear", final=0.1), 10, "from 0.0001 to 0.00055"),
        (_run(8, schedule="linear", warmup=4), _run(12, schedule="linear", warmup=4), 6, "from 0.0005 to 0.00075"),
        (_run(8, schedule="linear", warmup=4), _run(12, schedule="linear", warmup=4), 2, ""),  # it rises as before
        (_run(10, schedule="constant"), _run(20, schedule="constant"), 5, ""),
        (_run(6), _run(12, end=6), 6, ""),
        (_run(6, end=6), _run(12, end=6), 6, ""),
        (_run(6, end=12), _run(12), 6, ""),
        (_run(6), _run(6), 3, ""),
    ],
)  # fmt: skip
def test_other_steps_that_move_the_rate_are_one_sentence(old, new, step, said):
    told = rate_change(old, new, step)
    assert said in told and bool(told) == bool(said)
    if said:
        assert told.startswith(f"steps changed from {old['steps']} to {new['steps']}, with which the")


def test_a_run_may_go_on_with_the_end_of_its_schedule_written_out():
    assert check_config(_run(6), _run(12, end=6)) == {"optim.steps": (0, 6), "steps": (6, 12)}
    assert check_config(_run(6, end=6), _run(6)) == {"optim.steps": (6, 0)}
    for old, new in ((_run(6), _run(12, end=8)), (_run(6, end=6), _run(12))):
        with pytest.raises(ValueError, match=r"optim.steps: . -> .*add --config.optim.steps="):
            check_config(old, new)
