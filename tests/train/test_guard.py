"""A step that is not taken leaves no trace, a spike is told from a change, and the first bad place is found."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import digits
from src.build import build_system
from src.common.mesh.fsdp import Placement
from src.corruption.timesteps import Uniform
from src.interfaces import Batch
from src.models.heads.categorical import CategoricalHead
from src.models.layers import SwiGLU
from src.models.model import bind
from src.objectives.diffusion import Diffusion
from src.objectives.losses.squared_error import SquaredError
from src.train import skip_nonfinite
from src.train import step as steps
from src.train.nonfinite import locate
from src.train.nonfinite.locate import NonfiniteLocator, first_bad_gradient
from src.train.optim import build_optimizer
from src.train.state import TrainState
from src.train.trainer import make_trainer
from tests.helpers import models
from tests.helpers.numbers import bare, plan_of, system_of


def product(params, view, noise):
    """(noise · w) times the data; `still` has an infinite gradient and is frozen."""
    return (params["w"] * noise).sum() * view.batch.cond["x"].sum() + jnp.sqrt(params["still"])


@pytest.mark.parametrize("moments", ["bfloat16", pytest.param("factored", marks=pytest.mark.faults)])
def test_a_run_with_bad_steps_is_bit_for_bit_the_run_without_them(monkeypatch, moments):
    optim = {"lr": 0.1, "warmup": 4, "moments": moments, "lr_multipliers": (("still", 0.0), (".*", 1.0))}
    config = ConfigDict({"seed": 0, "accumulate": 1, "optim": optim, "guard": {"spike": 6.0}})
    config.ema = {"decay": 0.75, "warmup": False}
    system = system_of(monkeypatch, config, product, lambda key: jax.random.normal(key, (1, 128, 128)))
    params = {"w": jnp.full((128, 128), 0.5), "still": jnp.zeros(())}
    optimizer, _ = build_optimizer(config.optim, params)
    extra = {"seed": jnp.uint32(0), "guard": skip_nonfinite.new_guard()}
    start = TrainState(jnp.int32(0), params, params, optimizer.init(params), extra)
    make = lambda: jax.jit(steps.make_train_step(system, optimizer, config, Placement({}, jnp.float32)))

    def run(step, numbers):
        state = start
        for number in numbers:
            data = {1: np.nan, 3: np.inf, 4: 1e30}.get(number, 1.0)  # the last one's norm overflows
            batch = {"t": Batch({}, {"x": np.full((1, 1), data, np.float32)})}
            state, _ = step(state.replace(step=jnp.int32(number)), batch)
        return state

    step = make()
    guarded, healthy = run(step, range(6)), run(step, (0, 2, 5))
    monkeypatch.setattr(steps, "select", lambda good, new, old: new)
    plain = make()
    unguarded = run(plain, (0, 2, 5))
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(guarded, part), getattr(healthy, part))
    for part in ("params", "ema"):  # another program may round to bfloat16 in other places
        close = functools.partial(np.testing.assert_allclose, rtol=1e-3)
        jax.tree.map(close, getattr(healthy, part), getattr(unguarded, part))
    assert [int(guarded.extra["guard"][k]) for k in ("skipped", "streak")] == [3, 0]
    assert np.count_nonzero(guarded.extra["guard"]["norms"]) == 3
    assert not np.isfinite(run(plain, (0, 1)).params["w"]).any(), "unguarded, a bad step must do harm"


def test_a_spike_is_told_from_a_change():
    """Norms as a run has them: falling from a high beginning, log-normal about their middle, with a burst at 1000."""
    rng = np.random.default_rng(0)
    norms = 10 * np.exp(-np.arange(1500) / 40) + 1 / (1 + np.arange(1500) / 500)
    norms = norms * np.exp(0.3 * rng.standard_normal(1500))
    spikes = {120: 1e4, 240: 100, 700: 100, 1400: 100, 1000: 8}  # the first comes before the window is full
    norms[list(spikes)] *= list(spikes.values())
    norms[699] = np.nan  # must not enter the window, where it would hide the spike after it

    def step(memory, number):
        square = jnp.asarray(norms, jnp.float32)[number] ** 2
        good, memory = skip_nonfinite.accept_step(memory, number, jnp.zeros(()), square, 6.0)
        return memory, good

    _, good = jax.jit(lambda: jax.lax.scan(step, skip_nonfinite.new_guard(), jnp.arange(1500)))()
    assert list(np.flatnonzero(~np.asarray(good))) == [240, 699, 700, 1400]
    window = norms[240 - skip_nonfinite.WINDOW : 240]
    assert norms[240] < window.mean() + 6 * window.std(), "mean and deviation would have missed it"


BAD = 111.0  # a weight of that value makes its layer fail
UP, TEXTS = "trunk/layers/mlp/up/kernel", "image_to_caption"


@pytest.fixture(scope="module")
def small():
    """(locator, parameters, batch) of four blocks."""
    config = digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators, config.mesh.data = {}, 1
        del config.tasks["number_sentences"]
        config.tasks.caption_to_image.weight = config.tasks[TEXTS].weight = 1
        config.batch, config.accumulate = 8, 2
        config.model.trunk.update({"depth": 4, "width": 16, "mlp_width": 32})
    mlp, nll = SwiGLU.__call__, CategoricalHead.nll
    fail = lambda y, mark: jnp.where(mark == BAD, jnp.nan, y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwiGLU, "__call__", lambda self, x: fail(mlp(self, x), self.up.kernel[...][0, 0]))
        patch.setattr(CategoricalHead, "nll", lambda self, *args: fail(nll(self, *args), self.linear.kernel[...][0, 0]))
        system, rng = build_system(config), np.random.default_rng(0)
        shapes = jax.eval_shape(system.init, jax.random.key(0))
        params = jax.tree.map(lambda s: 0.1 * rng.standard_normal(s.shape, np.float32), shapes)
        batch = {name: plan.task.fake(plan.rows, 0) for name, plan in system.tasks.items()}
        yield NonfiniteLocator(make_trainer(system, jax.devices()[:1])), params, jax.tree.map(np.array, batch)


@pytest.mark.faults
def test_the_first_place_of_the_forward_pass_is_found(small):
    locator, params, batch = small
    grads = {UP: np.full(4, np.nan), "fields/text/head/linear/kernel": np.ones(())}
    find = lambda: locator.locate(params, batch, 3, grads)
    assert find() == f"gradient of {UP}, layer 4 of 4", "without a place in the forward pass, it is the gradient's"
    grads = {}
    assert find() == "", "a healthy step has no such place"
    params["fields"]["text"]["head"]["linear"]["kernel"][0, 0] = BAD
    assert find() == f"head: task {TEXTS}, text, text.caption, row 0, 1, 2 and 1 more"
    up = params["trunk"]["layers"]["mlp"]["up"]["kernel"]
    up[1, 0, 0] = up[2, 0, 0] = BAD
    assert find() == "block 2 of 4 of the trunk, in task caption_to_image, row 0, 1, 2 and 1 more"
    up[3, 5, 5] = np.inf
    assert find() == f"parameter: {UP}, layer 4 of 4"
    batch[TEXTS].tokens["image"].value[3, 2, 2, 0] = -np.inf
    assert find() == f"data: task {TEXTS}, image, row 3"


def test_gradients_are_searched_from_the_heads_back():
    layers = {name: np.asarray([np.nan, np.inf, 1.0]) for name in ("mlp/down/kernel", "mlp_norm/scale")}
    squares = {f"trunk/layers/{name}": x for name, x in layers.items()} | {"fields/text/embed/table/embedding": np.nan}
    squares |= {"trunk/layers/attention/q/kernel": np.asarray([np.nan, 1.0, 1.0]), "fields/image/head/linear/bias": 1.0}
    names = "trunk/layers/mlp/down/kernel, layer 2 of 3, trunk/layers/mlp_norm/scale, layer 2 of 3"
    assert first_bad_gradient(squares) == f"gradient of {names}"
    assert first_bad_gradient(squares | {"trunk/final_norm/scale": np.inf}) == "gradient of trunk/final_norm/scale"
    head = "fields/image/head/linear/bias"
    assert first_bad_gradient(squares | {head: np.inf}) == f"gradient of {head}"
    assert first_bad_gradient({head: 1.0}) == ""


@pytest.mark.faults
def test_what_comes_before_the_blocks_is_told_apart():
    """Values behind the codecs, noise and times, and the network's own first estimate, each by row."""
    hinted = lambda: {n: dataclasses.replace(f, hint=n == "image") for n, f in models.table().items()}
    architecture, params = models.make(rows=hinted)
    objective = Diffusion("image", SquaredError(), Uniform(), hint=1.0)
    view = models.row()
    plan = plan_of({"noise": (objective, 1.0)}, models.ROWS, view.layout)
    system = dataclasses.replace(bare({"t": plan}, fields=architecture.table), architecture=architecture)
    draws = objective.draw(jax.random.key(0), architecture.table, view)

    def first(params=params, view=view, draws=draws):
        """The first stage with bad values, the name there, and the rows."""
        net = bind(architecture, params, measure=locate._bad)
        flags = locate._network(system, net, ({"t": view}, {"t": {"noise": draws}}))
        flags = sorted(flags.items(), key=lambda entry: locate.KINDS.index(entry[0][0]))
        (kind, _, name), count = next((entry for entry in flags if np.any(entry[1])), (("", "", ""), []))
        return kind, name, np.flatnonzero(count).tolist()

    assert first() == ("", "", [])
    clean = view.batch.tokens["image"].value
    assert first(view=models.value(view, "image", clean.at[1, 2, 0].set(jnp.inf))) == ("codec", "image", [1])
    assert first(draws=draws | {"noise": {"image": draws["noise"]["image"] * jnp.nan}}) == (
        "corruption",
        "image",
        [0, 1],
    )
    kernel = params["fields"]["image"]["head"]["linear"]
    spoilt = jax.tree.map(lambda a: a, params)
    spoilt["fields"]["image"]["head"]["linear"] = kernel | {"bias": kernel["bias"] * jnp.inf}
    assert first(params=spoilt) == ("first estimate", "image", [0, 1])
