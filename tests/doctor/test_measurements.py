"""What the doctor measures while a run trains: each number by hand, with the fault that it is there to show."""

import itertools
import time
import types
from unittest.mock import create_autospec

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from configs import common
from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.common.mesh.fsdp import Placement
from src.common.mesh.sharding import make_mesh
from src.common.rng import step_key
from src.common.runtime.progress import Progress, describe
from src.common.runtime.writers import Many
from src.common.tree import flatten, unflatten
from src.data.pipeline.stream import Mixture
from src.data.sources.digits import Digits
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.doctor import gradient_conflict, layer_stats
from src.doctor.gradient_conflict import ConflictStats, GradientConflict, conflict_stats, scalars
from src.doctor.held_out import HeldOut
from src.interfaces import Batch, Field, FieldSpec, LossTerm
from src.objectives.diffusion import by_time
from src.sequence.layout import FixedLayout
from src.sequence.segment import Segment
from src.train import loop, skip_nonfinite
from src.train import system as systems
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.metrics import Metrics
from src.train.state import TrainState, first_state
from src.train.step import StepMetrics, make_train_step
from src.train.system import TaskPlan
from src.train.trainer import Trainer, make_trainer, open_data
from tests.data.test_bad_rows import Flawed
from tests.helpers import fields, models, numbers
from tests.helpers.numbers import bare, plan_of
from tests.helpers.runs import close, config_of

# ----------------------------------------------------------------------- in the step and the loop


def test_quarters_of_diffusion_time_add_up_and_are_told_aside():
    """A network that is bad where there is much noise is seen in the last quarter; progress does not print them."""
    t = jnp.asarray([0.0, 0.1, 0.25, 0.4, 0.6, 0.74, 0.75, 0.9, 1.0])[:, None]
    loss = jnp.where(t > 0.8, 9.0, 1.0)
    terms = by_time("mse", loss, t, t >= 0)
    means = {k.removeprefix("mse@"): float(v.total / v.count) for k, v in terms.items()}
    assert means == {"0.00-0.25": 1, "0.25-0.50": 1, "0.50-0.75": 1, "0.75-1.00": pytest.approx(19 / 3)}
    assert sum(float(v.count) for v in terms.values()) == 9 and not any(v.trained for v in terms.values())
    np.testing.assert_allclose(sum(v.total for v in terms.values()), loss.sum())
    spoilt, left_out = (by_time("mse", loss.at[0].set(jnp.nan), t, valid) for valid in (t >= 0, t > 0))
    assert [bool(jnp.isnan(v.total)) for v in spoilt.values()] == [True, False, False, False]
    assert [float(v.count) for v in left_out.values()] == [1, 2, 2, 3] and jnp.isfinite(
        sum(v.total for v in left_out.values())
    )

    meter = Metrics(bare(), lambda step: 0.0)
    terms = {f"draw/diffusion/{k}": v for k, v in terms.items()} | {"draw/diffusion/mse": LossTerm(loss.sum(), 9.0)}
    meter.add(StepMetrics(terms | {"total": LossTerm(5.0, 1.0)}, {}, skip_nonfinite.new_guard()))
    told = meter.flush(1)
    assert told["buckets/draw/diffusion/0.75-1.00"] == pytest.approx(19 / 3)
    assert describe({k: v for k, v in told.items() if "second" not in k}) == "loss 5, draw 2.778"


@pytest.mark.parametrize("slow, share", [(0.0, 0.0), (3.0, 0.75)])
def test_slow_data_are_seen_as_waiting(monkeypatch, slow, share):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def spend(seconds, value):
        now[0] += seconds
        return value

    data = create_autospec(Mixture, instance=True)
    data.__next__.side_effect = lambda: spend(slow, {})
    mesh, state = make_mesh({"data": 1}, jax.devices()[:1]), TrainState(0, {}, {}, (), {})
    system = bare(config=common.base())
    trainer = Trainer(system, mesh, optax.sgd(1.0), lambda step: 0.0, state, Placement({}, jnp.float32))
    checkpoints, progress = (create_autospec(kind, instance=True) for kind in (Checkpointer, Progress))
    run = loop.Run(trainer, checkpoints, Kept(), loop.NoCallback(), data, progress, state, 0)
    run.update = lambda state, batch: (
        state,
        spend(1.0, StepMetrics({"total": LossTerm(1.0, 1.0)}, {}, skip_nonfinite.new_guard())),
    )
    for _ in range(2):
        run.advance()
        run.advance()
        assert run.metrics.flush(run.step)["data_wait"] == pytest.approx(share)


# ----------------------------------------------------------------------- at every log line


def test_a_block_that_moves_too_fast_is_seen_in_its_ratio():
    size = {"trunk/layers/a": np.full(3, 4.0), "trunk/layers/b": np.zeros(3), "trunk/norm/scale": 1.0}
    size |= {"fields/text/head/x": 0.0, "fields/text/embed/x": 1.0, "fields/text/embed/y": 3.0}
    update = {"trunk/layers/a": np.asarray([4e-6, 4e-2, 4e-6]), "trunk/layers/b": np.zeros(3)}
    update |= {path: 1e-6 for path in size if path not in update}
    found = layer_stats.ratios(update, size)
    expected = {"block_00": 1e-3, "block_01": 1e-1, "block_02": 1e-3, "norm": 1e-3, "text/embed": 0.5e-3 * 2**0.5}
    assert found == {k: pytest.approx(v) for k, v in expected.items()}
    squares = {"trunk/layers/a": np.where(np.arange(28) == 17, 100.0, 1.0), "fields/text/head/x": 4.0}
    deep = layer_stats.logged({part: square**0.5 for part, square in layer_stats.by_part(squares).items()})
    blocks = {f"block_{i:02d}": 1.0 for i in (0, 6, 13, 20, 27)}
    assert deep == blocks | {"blocks_largest": 10.0, "text/head": 2.0}


def test_a_frozen_average_lags_and_padding_is_counted():
    system = bare({"draw": plan_of({}, 4, FixedLayout((Segment("text", 6), Segment("image", 3, lead=1))))})
    look = layer_stats.LayerStats(types.SimpleNamespace(system=system, mesh=make_mesh({"data": 1}, jax.devices()[:1])))
    ema = {"a": jnp.asarray([2.0, 1.0]), "b": jnp.asarray(2.0)}

    def see(scale, used):
        """The average stands still while the parameters grow."""
        valid = jnp.arange(6)[None] < jnp.asarray(used)[:, None]
        text = models.tokens(jnp.zeros((4, 6), jnp.int32), valid)
        batch = {"draw": Batch({"text": text, "image": models.tokens(jnp.zeros((4, 3, 2)))})}
        params = {k: scale * v for k, v in ema.items()}
        squares = {k: jnp.square(v).sum() for k, v in params.items()}
        measured = StepMetrics({}, {"grad": squares, "update": squares, "param": squares}, skip_nonfinite.new_guard())
        found = look(1, TrainState(0, params, ema, None, {}), batch, measured)
        assert {"ratio/a", "gradient/b"} <= found.keys()
        return found["ema_lag"], found["padding/draw"]

    assert see(1.0, [6, 6, 6, 6]) == (0.0, 0.0)
    assert see(2.0, [6, 2, 0, 4]) == (pytest.approx(0.5), pytest.approx(12 / 40))
    assert see(4.0, [0, 0, 0, 0]) == (pytest.approx(0.75), pytest.approx(24 / 40))


# ----------------------------------------------------------------------- the gradient conflict


class Along:
    """The mean over rows of row · direction · w: its gradient is mean(rows) · direction."""

    names = ()

    def __init__(self, *direction):
        self.direction = jnp.asarray(direction)

    def draw(self, key, fields, view):
        return ()

    def prepare(self, net, view, draws):
        return view, view.batch.cond["rows"]

    def loss(self, net, hidden, aux):
        total = (aux * (net.params["trunk"]["w"] @ self.direction)).sum()
        return {"along": LossTerm(total, jnp.asarray(aux.shape[0], jnp.float32))}


class Net(numbers.Net):
    """Two blocks, the second of which explodes, and nothing but its parameters."""

    def __init__(self, architecture, params, placement, measure=None):
        super().__init__(params)
        self.measure = measure

    def run(self, views):
        valid = views["t"].batch.tokens["text"].valid  # beside it, and behind it, is garbage
        garbage = jnp.pad(jnp.where(valid, 0.0, 9.0), ((0, 0), (0, 1)), constant_values=9.0)
        seen = [self.measure(garbage[..., None] + jnp.full(4, scale)) for scale in (1.0, 1e6)]
        return self.hidden(views), [jax.tree.map(lambda *a: jnp.stack(a), *seen)]


def test_the_conflict_of_two_objectives_by_hand(monkeypatch):
    """Opposite objectives have cosine -1; norms carry the weights; the gradients add up to that of the step."""
    for module in (systems, gradient_conflict):
        monkeypatch.setattr(module, "bind", Net)
    words = FieldSpec(vocab=9)
    table = {"text": Field("text", words, models.chain(models.given(words)))}
    valid = jnp.arange(3) < jnp.asarray([[3], [2], [1], [0]])
    text = models.tokens(jnp.zeros((4, 3), jnp.int32), valid)
    objectives = {"one": (Along(1.0, 0.0), 2.0), "against": (Along(-3.0, 0.0), 1.0), "across": (Along(1.0, 1.0), 1.0)}
    objectives["idle"] = (Along(1.0, 0.0), 0.0)
    tasks = {"t": plan_of(objectives, 4, FixedLayout((Segment("text", 3),)))}
    params = {"trunk": {"w": jnp.ones(2)}}
    batch = {"t": Batch({"text": text}, {"rows": jnp.asarray([1.0, 5.0, 1.0, 9.0])})}
    place, sgd = Placement({}, jnp.float32), optax.sgd(1.0)

    def probe(accumulate):
        config = {"accumulate": accumulate, "ema": {"decay": 0.5, "warmup": False}, "guard": {"spike": 0.0}}
        config = ConfigDict(config | {"optim": {"lr_multipliers": ((".*", 1.0),)}})
        system = bare(tasks, config, table)
        state = first_state(params, sgd, 0)
        squares = jax.jit(make_train_step(system, sgd, config, place))(state, batch)[1].squares["grad"]
        stats = jax.device_get(jax.jit(lambda: conflict_stats(system, params, step_key(0, 0), batch, place))())
        return scalars(system, stats), stats.products.sum(), squares["trunk/w"]

    kept = params | {"states": {"text": {"seen": jnp.ones((), jnp.int32)}}, "teacher": {"trunk": {"w": jnp.ones(2)}}}
    system = bare(tasks, ConfigDict({"accumulate": 1}), table)
    plain, adaptive = (conflict_stats(system, p, step_key(0, 0), batch, place).products for p in (params, kept))
    np.testing.assert_array_equal(plain, adaptive)  # whole numbers of a state have no gradient
    found, together, step = probe(1)
    np.testing.assert_allclose(together, step, rtol=1e-6)
    norms = {"one": 2.0, "against": 3.0, "across": np.sqrt(2)}
    assert {k: v for k, v in found.items() if "norm" in k} == {
        f"conflict/norm/t.{k}": pytest.approx(4 * v, rel=1e-6) for k, v in norms.items()
    }
    assert {k.removeprefix("conflict/cosine/"): v for k, v in found.items() if "cosine" in k} == {
        "t.one/t.against": pytest.approx(-1.0),
        "t.one/t.across": pytest.approx(np.sqrt(0.5)),
        "t.against/t.across": pytest.approx(-np.sqrt(0.5)),
    }
    assert found["activation/t/block_00"] == pytest.approx(1.0) and found["activation/t/block_01"] == pytest.approx(1e6)
    assert probe(2)[0]["conflict/norm/t.one"] == pytest.approx(2.0), "of the rows 0 and 2 alone"


def test_many_objectives_are_logged_against_the_rest():
    directions = np.asarray([[1.0, 0], [1, 0], [1, 0], [1, 0], [-1, 0], [0, 0]])
    plan = plan_of(dict.fromkeys("abcdef", (Along(1.0, 0.0), 1.0)))
    found = scalars(bare({"t": plan}), ConflictStats(directions @ directions.T, {}))
    cosines = {k: v for k, v in found.items() if "cosine" in k}
    assert cosines == {f"conflict/cosine/t.{k}/rest": 1.0 if k != "e" else -1.0 for k in "abcde"}


def tiny(mesh, **changes):
    """A trainer of two tasks on a mesh of that shape, parameters whose head is not at zero, and the first batch."""
    sizes = dict(zip(("data", "fsdp", "tensor", "context"), mesh, strict=True))
    held_out = {"doctor": {"every": 0, "panels": 1, "batches": 2, "drawings": 0}}
    changes = {"sharding.min_size": 1, "model.trunk.kv_heads": 2} | held_out | changes
    config = config_of(**{f"mesh.{axis}": size for axis, size in sizes.items()} | changes)
    with config.unlocked():
        config.batch = 56
        del config.tasks["number_sentences"]  # one row length compiles twice as fast
        config.fields.image.head.init = "normal:0.02"
    trainer = make_trainer(build_system(config), jax.devices()[: int(np.prod(mesh))])
    data = open_data(trainer)
    batch = put_batch(next(data), trainer.mesh)
    data.close()
    return trainer, trainer.init_params(), batch


@pytest.fixture(scope="module")
def split():
    return tiny((1, 2, 2, 1))


def changed(params, path, change):
    flat = flatten(params)
    return unflatten(flat | {path: change(flat[path])})


@pytest.mark.faults
def test_a_block_that_explodes_is_seen_in_its_activations(split):
    trainer, params, batch = split
    probe, first = GradientConflict(trainer).compile(), (jnp.uint32(0), jnp.int32(1))
    healthy = jax.device_get(probe(params, *first, batch))
    named = scalars(trainer.system, healthy)
    assert len([k for k in named if "cosine" in k]) == 1 and all(np.isfinite(v) for v in named.values())
    loud = changed(params, "trunk/layers/mlp/down/kernel", lambda kernel: kernel.at[1].multiply(1e3))
    exploded = jax.device_get(probe(loud, *first, batch))
    for task, rms in healthy.rms.items():
        np.testing.assert_allclose(exploded.rms[task][0], rms[0], rtol=1e-5)
        assert exploded.rms[task][1] > 10 * rms[1] and 0.1 < rms[1] < 10


@pytest.mark.faults
@pytest.mark.parametrize(
    "dtype, meshes",
    # XLA's compiler for CPUs aborts on sums over `tensor` in bfloat16,in the step and in this pass.
    [("float32", [(2, 2, 2, 1), (2, 1, 1, 4)]), ("bfloat16", [(2, 2, 1, 1), (2, 1, 1, 4)])],
)
def test_the_conflict_has_the_gradient_of_the_step_on_any_mesh(dtype, meshes):
    """|Σ gradients of the objectives|² on the trunk is the step's, with the same noise."""
    changes = {"model.dtype": dtype, "doctor.every": 1}
    trainer, params, batch = tiny((1, 1, 1, 1), **changes)
    step, state = trainer.compile(), trainer.init()
    jax.tree.map(np.testing.assert_array_equal, params, state.params)  # as they were at the start of the run
    _, measured = step(state, batch)
    grads = jax.device_get(measured.squares["grad"])
    whole = sum(a.sum() for path, a in grads.items() if path.startswith("trunk/"))
    rms = []
    for mesh in [(1, 1, 1, 1), *meshes]:
        trainer, params, batch = tiny(mesh, **changes)
        found = jax.device_get(GradientConflict(trainer).compile()(params, jnp.uint32(0), jnp.int32(1), batch))
        np.testing.assert_allclose(found.products.sum(), whole, rtol=1e-4 if dtype == "float32" else 3e-2)
        rms.append(found.rms)
    close(rms[1:], [rms[0]] * 2, rtol=1e-5 if dtype == "float32" else 1e-2)


def test_when_measurements_are_due():
    """At the first log line at or after its step, whatever was resumed; debug runs are too short for it."""

    def due(cls, steps, **changes):
        config = config_of(**{"steps": 40, "log.every": 3} | changes)
        trainer = types.SimpleNamespace(system=types.SimpleNamespace(config=config))
        measurement = cls.__new__(cls)
        measurement.trainer, measurement.every = trainer, changes.get("doctor.every", changes.get("doctor.panels", 0))
        return [step for step in range(1, steps + 1) if measurement.due(step) and (cls is HeldOut or step % 3 == 0)]

    assert due(GradientConflict, 40, **{"doctor.every": 10}) == [12, 21, 30]
    assert due(HeldOut, 40, **{"doctor.panels": 15}) == [15, 30, 40] and due(HeldOut, 40) == [40]


# ----------------------------------------------------------------------- held-out evaluations


class Kept(Many):
    """A writer that keeps what it is given."""

    def __init__(self):
        super().__init__([])
        self.scalars, self.texts = {}, {}

    def write_scalars(self, step, scalars):
        self.scalars[step] = dict(scalars)

    def write_texts(self, step, texts):
        self.texts[step] = dict(texts)


@pytest.mark.faults
def test_what_was_forgotten_since_the_start_is_seen(split):
    """Initial parameters have forgotten nothing; spoilt words show in the text; a resumed run has the same numbers."""
    trainer, params, _ = split
    state, writer, held_out = TrainState(0, None, params, None, {}), Kept(), HeldOut(trainer)
    head = "fields/text/head/linear/kernel"
    with jax.set_mesh(trainer.mesh):
        held_out(1, state, writer)
        noise = jax.random.normal(jax.random.key(0), flatten(params)[head].shape)
        state = state.replace(ema=changed(params, head, lambda kernel: kernel + 3 * noise))
        held_out(2, state, writer)
        held_out._initial = None  # as after a restart
        held_out(3, state, writer)
    loss, change = ({k: v for k, v in writer.scalars[1].items() if k.startswith(kind)} for kind in ("held", "forg"))
    image, text = "caption_to_image/diffusion/mse", "image_to_caption/text/nll"
    assert set(loss) == {f"heldout/{image}", f"heldout/{text}"} and all(v > 0 for v in loss.values())
    assert change == {f"forgetting/{image}": 0, f"forgetting/{text}": 0}
    assert writer.scalars[2][f"forgetting/{text}"] > 1 and writer.scalars[2][f"forgetting/{image}"] == 0
    assert writer.scalars[3] == writer.scalars[2]
    assert f"| {text} | {loss[f'heldout/{text}']:.4g} |" in writer.texts[2]["forgetting"]


def test_a_held_out_row_that_cannot_be_used_counts_nothing():
    """Of 360 held-out rows spread over 2 batches of 4, the second batch begins with row 45."""
    config = ConfigDict({"steps": 1, "eval": {"every": 0}, "doctor": {"panels": 0, "batches": 2, "drawings": 0}})
    task = Flawed(SourceTask("draw", Digits(), CaptionToImage(), fields.table()), {45})
    tasks = {"draw": TaskPlan(task, task.layout, 4, {})}
    mesh = make_mesh({"data": 2}, jax.devices()[:2])
    held_out = HeldOut(types.SimpleNamespace(system=bare(tasks, config), mesh=mesh))
    made = [batch["draw"].tokens["image"].target.all(-1).tolist() for batch in held_out._rows()]
    assert made == [[True] * 4, [False, True, True, True]]
    (second,) = itertools.islice(held_out._rows(), 1, None)
    assert not second["draw"].tokens["text.prompt"].valid[0].any()
