"""NaN, infinity and spikes in data, network, loss and gradient: the step is not taken, and told by its first place."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import digits
from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.common.runtime.writers import Many
from src.data.pipeline.stream import Mixture
from src.models.heads.categorical import CategoricalHead
from src.models.layers import SwiGLU
from src.train import loop, skip_nonfinite
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.nonfinite.locate import NonfiniteLocator
from src.train.trainer import make_trainer, open_data

pytestmark = pytest.mark.faults

FORWARD, BACKWARD, HEAD = 111.0, 222.0, 333.0  # a weight of that value makes its layer fail
IMAGES, TEXTS = "caption_to_image", "image_to_caption"


@jax.custom_vjp
def spoil_gradient(x, when):
    """x, whose gradient is NaN."""
    return x


spoil_gradient.defvjp(
    lambda x, when: (x, when), lambda when, g: (jnp.where(when, jnp.nan, g), np.zeros(when.shape, jax.dtypes.float0))
)


@pytest.fixture(scope="module")
def trainer():
    """Four blocks on four devices with two microbatches; layers fail where a weight says so. Compiled once."""
    config = digits.get_config("debug")
    with config.unlocked():
        config.eval.evaluators = {}
        del config.tasks["number_sentences"]
        config.tasks[IMAGES].weight = config.tasks[TEXTS].weight = 1
        config.batch, config.accumulate, config.optim.steps = 16, 2, 20
        config.model.dtype = config.optim.moments = "bfloat16"
        config.optim.warmup = 0
        config.mesh.data, config.mesh.fsdp, config.sharding.min_size = 2, 2, 1
        config.model.trunk.update({"depth": 4, "width": 16, "mlp_width": 32})
        config.log.every, config.guard.spike = 1, 6.0
    mlp, nll = SwiGLU.__call__, CategoricalHead.nll

    def failing_mlp(self, x):
        mark = self.up.kernel[...][0, 0]
        return spoil_gradient(jnp.where(mark == FORWARD, jnp.nan, mlp(self, x)), mark == BACKWARD)

    def failing_head(self, hidden, target, noise=()):
        return jnp.where(self.linear.kernel[...][0, 0] == HEAD, jnp.inf, nll(self, hidden, target, noise))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SwiGLU, "__call__", failing_mlp)
        patch.setattr(CategoricalHead, "nll", failing_head)
        patch.setattr(skip_nonfinite, "WINDOW", 4)
        trainer = make_trainer(build_system(config), jax.devices()[:4])
        compiled = trainer.compile()
        trainer.compile, trainer.locator = lambda: compiled, NonfiniteLocator(trainer)
        yield trainer


def mark(params, path, place, value):
    """Parameters with one weight changed."""
    change = lambda p, x: x.at[place].set(value) if jax.tree_util.keystr(p, simple=True, separator="/") == path else x
    return jax.tree_util.tree_map_with_path(change, params)


def spoil(batch, task, row, value):
    """A batch with one row of images changed."""
    return put(batch, task, "image", row, value)


def put(batch, task, name, row, change):
    """A batch with some values of a name changed."""
    tokens = batch[task].tokens
    values = np.array(tokens[name].value)
    values[row] = change(values[row])
    return batch | {task: batch[task].replace(tokens=tokens | {name: tokens[name].replace(value=values)})}


def nan_at(row, task=IMAGES):
    return lambda batch: spoil(batch, task, row, lambda x: np.where(np.arange(x.size).reshape(x.shape) == 3, np.nan, x))


def token(batch, row):
    return put(batch, TEXTS, "text.caption", (row, 0), lambda x: 10**6)


def louder(batch):
    return spoil(batch, IMAGES, slice(None), lambda x: x * 1e4)


UP = "trunk/layers/mlp/up/kernel"
KERNEL = "fields/text/head/linear/kernel"
PLANTS = {
    "one value of one row": (None, nan_at(5), f"data: task {IMAGES}, image, row 5"),
    "infinite data of another task": (
        None,
        lambda batch: spoil(batch, TEXTS, slice(2, 4), lambda x: x + np.inf),
        f"data: task {TEXTS}, image, row 2, 3",
    ),
    "a token that there is none of": (None, lambda batch: token(batch, 5), f"embedding: task {TEXTS}, row 5"),
    "a weight": ((UP, (1, 0, 0), np.inf), None, f"parameter: {UP}, layer 2 of 4"),
    "the second of four blocks": ((UP, (1, 0, 0), FORWARD), None, f"block 2 of 4 of the trunk, in task {IMAGES}"),
    "a head": ((KERNEL, (0, 0), HEAD), None, f"head: task {TEXTS}, text, text.caption, row 0, 1"),
    "one layer's gradient": (
        (UP, (2, 0, 0), BACKWARD),
        None,
        "gradient of trunk/layers/mlp/down/kernel, layer 3 of 4, trunk/layers/mlp/gate/kernel, layer 3 of 4",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def begun(trainer):
    """A state after two steps, on the host, and the next batches."""
    with contextlib.closing(open_data(trainer)) as data, jax.set_mesh(trainer.mesh):
        batches, state = [next(data) for _ in range(3)], trainer.init()
        for batch in batches[:2]:
            state, measured = trainer.compile()(state, put_batch(batch, trainer.mesh))
    assert int(measured.guard["skipped"]) == 0
    batch = put_batch(batches[2], trainer.mesh)
    assert trainer.locator.locate(state.params, batch, 2, measured.squares["grad"]) == "", "healthy, and still found"
    return jax.device_get(state), batches[2]


def place(trainer, state):
    return jax.device_put(state, jax.tree.map(lambda leaf: leaf.sharding, trainer.abstract))


@pytest.mark.parametrize("plant", PLANTS)
def test_a_spoilt_step_changes_nothing_and_is_told_by_its_first_place(trainer, begun, plant):
    weight, change, told = PLANTS[plant]
    state, batch = begun
    before = state.replace(params=mark(jax.tree.map(jnp.asarray, state.params), *weight)) if weight else state
    batch = put_batch(change(batch) if change else batch, trainer.mesh)
    with jax.set_mesh(trainer.mesh):
        after, measured = trainer.compile()(place(trainer, before), batch)
    assert [int(measured.guard[k]) for k in ("skipped", "streak", "restored")] == [1, 1, 0]
    assert int(after.step) == 3
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, part), getattr(before, part))
    assert all(not np.any(x) for x in measured.squares["update"].values())
    assert trainer.locator.locate(after.params, batch, 2, measured.squares["grad"]).startswith(told)


class Lines(dict):
    """A writer that keeps what it is given."""

    def write_scalars(self, step, scalars):
        self[step] = scalars


def run(trainer, monkeypatch, folder, steps, bad=(), change=None, **settings):
    """Trains with the batches of some steps changed: (state, lines of the log)."""
    config = trainer.system.config
    settings = {"patience": 3, "restore": False, "restores": 1} | settings

    rows = {name: plan.rows for name, plan in trainer.system.tasks.items()}

    class Changed(Mixture):
        def __next__(self):
            batch = super().__next__()
            number = self.get_state()[IMAGES] // rows[IMAGES]
            return change(batch) if number in bad else batch

    def changed(trainer, workdir):
        data = open_data(trainer)
        data.__class__ = Changed
        return data

    monkeypatch.setattr(loop, "open_data", changed)
    with config.unlocked():
        config.steps, config.checkpoint.every = steps, 2
        config.guard.update(settings)
    lines, checkpoints = Lines(), Checkpointer(str(folder), keep=9, every=2)
    try:
        state, _ = loop.train(trainer, checkpoints, Many([lines]), 0.0)
        return jax.device_get(state), lines
    finally:
        checkpoints.close()


def saved(trainer, folder, step=None):
    """The state of the newest checkpoint, or of that step."""
    if step:
        folder = shutil.copytree(folder, folder.with_name(f"{folder.name}-{step}"))
        for later in (folder / "checkpoints").iterdir():
            if int(later.name) > step:
                shutil.rmtree(later)
    checkpoints = Checkpointer(str(folder))
    state = checkpoints.restore(trainer.abstract)[0]
    checkpoints.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    return jax.device_get(state)


def test_once_is_skipped_and_counted_also_when_the_run_is_resumed_in_between(trainer, monkeypatch, tmp_path):
    bad = (4, 5)
    state, lines = run(trainer, monkeypatch, tmp_path / "straight", 8, bad, nan_at(1))
    assert [lines[i]["guard/skipped"] for i in range(1, 9)] == [0, 0, 0, 1, 2, 2, 2, 2]
    assert ["loss" in lines[i] for i in range(1, 9)] == [i not in bad for i in range(1, 9)]
    assert all(np.isfinite(list(line.values())).all() for line in lines.values())
    assert lines[8]["learning_rate"] == pytest.approx(float(trainer.schedule(5)), rel=1e-6)
    assert lines[8]["loss"] < lines[1]["loss"]
    run(trainer, monkeypatch, tmp_path / "parts", 4, bad, nan_at(1))
    parts, _ = run(trainer, monkeypatch, tmp_path / "parts", 8, bad, nan_at(1))
    jax.tree.map(np.testing.assert_array_equal, parts, state)


def test_forever_stops_the_run_and_nothing_spoilt_is_saved(trainer, monkeypatch, tmp_path):
    with pytest.raises(FloatingPointError) as error:
        run(trainer, monkeypatch, tmp_path, 9, range(3, 10), nan_at(6))
    message = str(error.value)
    assert message.startswith(f"step 5 is the last of 3 skipped steps in a row: {IMAGES}/diffusion/mse, the gradient")
    assert f"(first in data: task {IMAGES}, image, row 6)" in message
    assert f"the last good checkpoint is that of step 4 in {tmp_path / 'checkpoints'}:" in message
    assert "\n" not in message
    last = saved(trainer, tmp_path)
    assert [int(x) for x in (last.step, last.extra["guard"]["skipped"])] == [4, 2]


def test_on_request_it_goes_back_and_leaves_the_bad_batches_out(trainer, monkeypatch, tmp_path):
    """Steps 5 to 7 are bad, and perhaps the parameters of 4 to 7 are why: back to 2. Step 8 is under way by then."""
    bad, back = range(5, 8), {"restore": True}
    state, lines = run(trainer, monkeypatch, tmp_path / "a", 10, bad, nan_at(0), **back)
    assert [lines[10][f"guard/{k}"] for k in ("skipped", "restored")] == [6, 1]
    assert sorted(lines) == list(range(1, 11)), "the steps go on and none is told twice"
    run(trainer, monkeypatch, tmp_path / "b", 8, bad, nan_at(0), **back)
    two, four, six, eight = (saved(trainer, tmp_path / "b", step) for step in (2, 4, 6, 8))
    for part in ("params", "ema", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(six, part), getattr(four, part))
        jax.tree.map(np.testing.assert_array_equal, getattr(eight, part), getattr(two, part))
    resumed, again = run(trainer, monkeypatch, tmp_path / "b", 10, bad, nan_at(0), **back)
    jax.tree.map(np.testing.assert_array_equal, resumed, state)
    assert [again[i]["loss"] for i in (9, 10)] == [lines[i]["loss"] for i in (9, 10)]
    with pytest.raises(
        FloatingPointError, match="step 11 is the last of 3 skipped steps in a row"
    ):  # 7 had its second chance
        run(trainer, monkeypatch, tmp_path / "c", 12, range(5, 99), nan_at(0), **back)
    with pytest.raises(FloatingPointError, match=r"guard\.restore found no checkpoint from before these parameters"):
        run(trainer, monkeypatch, tmp_path / "d", 12, range(1, 99), nan_at(0), patience=1, **back)


def test_a_spike_is_skipped(trainer, monkeypatch, tmp_path):
    _, lines = run(trainer, monkeypatch, tmp_path, 8, (7,), louder)
    assert [lines[i]["guard/skipped"] for i in range(5, 9)] == [0, 0, 1, 1]
    with pytest.raises(FloatingPointError, match=r"the gradient, of norm .*, was a spike; parameters are those before"):
        run(trainer, monkeypatch, tmp_path, 12, range(9, 13), louder)
