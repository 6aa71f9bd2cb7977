"""Bad data and dying workers under a whole training: what is skipped counts nothing, what is read stays the same."""

import itertools
import json
import multiprocessing
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import common
from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.common.runtime import stopping
from src.common.runtime.writers import Many
from src.data.example import BadRow
from src.data.pipeline.bad_rows import Ledger, TooManyBadRowsError
from src.data.pipeline.stream import DEATHS, Mixture, Stream
from src.data.sources import digits
from src.data.sources.captions import Captions
from src.data.task import SourceTask
from src.data.templates.image_to_caption import ImageToCaption
from src.doctor.callback import make_doctor
from src.interfaces import SequenceSpec
from src.models.attention import Sizes, find_backend
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.step import gradients
from src.train.system import draw
from src.train.trainer import make_trainer
from tests.helpers.fields import table
from tests.helpers.runs import close, config_of

pytestmark = pytest.mark.faults
ROWS = 1500


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """1,500 digits with captions, and the numbers of the 15 that are broken, in five ways."""
    folder = tmp_path_factory.mktemp("digits")
    images, lines = digits.load("train"), []
    for row in range(ROWS):
        values = images.values[row % 1437, ..., 0] * 127.5 + 127.5
        Image.fromarray(values.astype(np.uint8)).save(folder / f"{row}.png")
        lines.append(
            json.dumps({"image": f"{row}.png", "caption": digits.caption(int(images.labels[row % 1437]))}).encode()
        )
    bad = sorted(np.random.default_rng(0).choice(ROWS, ROWS // 100, replace=False).tolist())
    for number, row in enumerate(bad):
        match number % 5:
            case 0:
                (folder / f"{row}.png").unlink()
            case 1:
                (folder / f"{row}.png").write_bytes(b"")
            case 2:
                (folder / f"{row}.png").write_bytes((folder / f"{row}.png").read_bytes()[:-30])
            case 3:
                lines[row] = lines[row][:30]
            case 4:
                lines[row] = lines[row].replace(b"handwritten", b"\xff\xfe")
    (folder / "captions.jsonl").write_bytes(b"\n".join(lines) + b"\n")
    return folder, bad


def config(folder, **changes):
    """Both tasks of images with captions on the folder, tiny."""
    config = config_of()
    source, draw, say = (
        {"name": "captions", "folder": str(folder)},
        common.diffusion(),
        common.next_token("text.caption"),
    )
    template = lambda name: {"name": name, "length": 30}
    config.unlock()
    config.tasks = {
        "draw": {"source": source, "template": template("caption_to_image"), "weight": 1, "objectives": {"d": draw}},
        "say": {"source": source, "template": template("image_to_caption"), "weight": 1, "objectives": {"t": say}},
    }
    config.fields.text.codec = {"name": "text:Bytes"}
    config.steps, config.batch, config.log.every, config.checkpoint.every = 15, 200, 5, 10
    config.mesh.data = 1
    with config.unlocked():
        config.update_from_flattened_dict(changes)
    return config


class Everything(Many):
    """A writer that keeps all scalars."""

    def __init__(self):
        super().__init__([])
        self.scalars = {}

    def write_scalars(self, step, scalars):
        self.scalars.setdefault(step, {}).update(scalars)


def train(config, workdir):
    trainer = make_trainer(build_system(config), jax.devices()[:1])
    checkpoints, writer = Checkpointer(str(workdir), every=config.checkpoint.every), Everything()
    try:
        state, _ = loop.train(trainer, checkpoints, writer, 0.0, make_doctor(trainer))
    finally:
        checkpoints.close()
    return jax.device_get(state), writer.scalars


def test_a_training_with_one_percent_of_broken_rows_goes_on_and_reports_exactly_these(folder, tmp_path, monkeypatch):
    """Faults 21 and 23: one epoch of each task; the second half again from a checkpoint gives the same weights."""
    where, bad = folder
    state, scalars = train(config(where), tmp_path / "run")
    told = [json.loads(line) for line in (tmp_path / "run/skipped.jsonl").read_text().splitlines()]
    for name in ("draw", "say"):
        lines = {line["row"]: line for line in told if line["task"] == name}
        assert sorted(lines) == bad and all(
            line["where"] == f"captions.jsonl line {r + 1}" for r, line in lines.items()
        )
        assert sum(values.get(f"data/skipped/{name}", 0) for values in scalars.values()) == 15
    assert len(told) == 30 and {line["reason"] for line in told} == {
        "the image is missing", "the image cannot be read", "the line is not JSON", "the text is not UTF-8"
    }  # fmt: skip
    assert sorted(scalars) == [1, 5, 10, 15] and all(np.isfinite(list(v.values())).all() for v in scalars.values())

    with monkeypatch.context() as patch, pytest.raises(stopping.Stopped):
        steps = itertools.count(1)
        patch.setattr(stopping, "asked", lambda: next(steps) == 8)  # between two lines
        train(config(where), tmp_path / "again")
    resumed, later = train(config(where), tmp_path / "again")
    told_again = [{k: v for k, v in lines[10].items() if k.startswith("data/")} for lines in (scalars, later)]
    assert told_again[0] == told_again[1]
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), state, resumed))
    lines = (tmp_path / "again/skipped.jsonl").read_text().splitlines()
    assert sorted(lines) == sorted(json.dumps(line) for line in told)


def test_a_training_with_too_many_broken_rows_stops_with_the_list(folder, tmp_path):
    with pytest.raises(TooManyBadRowsError, match=r"captions.jsonl: .*line \d+.* line \d+"):
        train(config(folder[0], **{"data.max_bad": {"share": 0.005, "least": 3}}), tmp_path)


# --------------------------------------------------------------------------- losses and gradients


def marked(batch, bad):
    """The batch with its rows `bad` as skipped rows: text is not there, images keep their places."""
    nothing = lambda leaf: np.where(bad.reshape(-1, *[1] * (leaf.ndim - 1)), 0, leaf).astype(leaf.dtype)
    tokens = {name: jax.tree.map(nothing, part) for name, part in batch.tokens.items()}
    for name, part in batch.tokens.items():
        if not jnp.issubdtype(part.value.dtype, jnp.integer):
            tokens[name] = tokens[name].replace(valid=part.valid)
    return batch.replace(tokens=tokens)


@pytest.mark.parametrize("variant", ["debug", "official,debug"])
def test_losses_and_gradients_are_those_of_the_batch_without_the_skipped_rows(variant):
    system = build_system(config_of(variant=variant, batch=24))
    data = Mixture({n: p.task for n, p in system.tasks.items()}, dict.fromkeys(system.tasks, 8), 0)
    batch, bad = jax.tree.map(jnp.asarray, next(data)), np.isin(np.arange(8), (0, 3, 4))
    data.close()
    whole = jax.tree.map(jnp.asarray, {name: marked(fields, bad) for name, fields in batch.items()})
    params, key = system.init(jax.random.key(0)), jax.random.key(1)
    params = jax.tree.map(lambda p: p + 0.02 * jnp.cos(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
    drawn = draw(system, whole, jax.random.clone(key))
    without = jax.tree.map(lambda leaf: leaf[~bad], draw(system, batch, key))
    run = jax.jit(lambda rows, parts: gradients(system, params, rows, parts), static_argnums=1)
    expected = run(without, 1)
    assert all(term.count > 0 for term in expected[1].values() if term.trained)
    for parts in (1, 2, 8):  # of 8 some microbatches have skipped rows only
        close(run(drawn, parts), expected, rtol=1e-4, atol=1e-5)


def test_skipped_rows_on_a_mesh():
    """Two devices have skipped rows only."""
    found = []
    for devices in (1, 8):
        system = build_system(config_of(**{"mesh.data": -1}))
        trainer = make_trainer(system, jax.devices()[:devices])
        rows = {name: plan.rows for name, plan in system.tasks.items()}
        data = Mixture({name: plan.task for name, plan in system.tasks.items()}, rows, 0)
        batch = {n: marked(fields, np.arange(rows[n]) < rows[n] // 4) for n, fields in next(data).items()}
        data.close()
        with jax.set_mesh(trainer.mesh):
            state, measured = trainer.compile()(trainer.init(), put_batch(batch, trainer.mesh))
        found.append(jax.device_get((measured.terms, state.params)))
    close(found[1][0], found[0][0], rtol=2e-4, atol=1e-5)
    close(found[1][1], found[0][1], rtol=0, atol=2e-4)
    assert np.isfinite(jax.tree.leaves(found[0][0])).all()


@pytest.mark.parametrize("backend", ["dense", "splash"])
@pytest.mark.parametrize("by_row", [False, True])
def test_attention_of_a_row_without_any_token_is_finite_and_gives_no_gradient(backend, by_row):
    rows, length, width = 2, 128, 16
    segment = jnp.asarray(np.arange(rows)[:, None] + np.zeros((rows, length), np.int32))  # row 0 is all padding
    order = np.arange(length)
    orders = [order, order, np.zeros_like(order)]
    if by_row:
        orders = [jnp.broadcast_to(a, (rows, length)) for a in orders]
    spec = SequenceSpec(*orders, segment, jnp.zeros((rows, length, 1), jnp.int32))
    sizes = Sizes(rows, length, length, 2, 2, width, jnp.float32, "cpu")
    q, k, v = jax.random.normal(jax.random.key(0), (3, rows, length, 2, width))

    def loss(q, k, v):
        out = find_backend(backend)(spec, spec, sizes)(q, k, v)
        return jnp.where((segment > 0)[..., None, None], out, 0).sum(), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    assert jnp.isfinite(out).all() and all(jnp.isfinite(g).all() and not g[0].any() for g in grads)
    assert all(g[1].any() for g in grads)


# --------------------------------------------------------------------------- workers that die


def stream(folder, workers):
    task = SourceTask("say", Captions(folder), ImageToCaption(30), table(size=(8, 8, 1)))
    return Stream(task, 8, 0, workers=workers, name="say", ledger=Ledger())


def kill_workers():
    children = [child for child in multiprocessing.active_children() if "Spawn" in type(child).__name__]
    assert children
    os.kill(children[0].pid, signal.SIGKILL)


def test_a_worker_that_is_killed_is_replaced_and_the_rows_are_the_same(folder, caplog):
    """Fault 24."""
    alone, workers = stream(folder[0], 0), stream(folder[0], 2)
    expected = [next(alone) for _ in range(40)]
    alone.close()
    for number, batch in enumerate(expected):
        if number in (1, 12):
            kill_workers()
        found = next(workers)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), found, batch)), number
    assert workers.get_state() == 320
    workers.close()
    told = [r.getMessage() for r in caplog.records if "its workers start again at row" in r.getMessage()]
    assert len(told) == 2 and all("task say" in t and "exit code -9" in t for t in told)
    assert workers._ledger.skipped == alone._ledger.skipped


def test_workers_that_die_again_and_again_end_the_run(folder):
    dying = stream(folder[0], 1)

    def fetch():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search the logs.")

    class Dead:
        __next__ = staticmethod(fetch)
        closed = 0

        def close(self):
            Dead.closed += 1

    dying._open = Dead
    with pytest.raises(RuntimeError, match=rf"task say: {DEATHS + 1} data workers died .*exit code -9"):
        next(dying)
    assert Dead.closed == DEATHS


def test_an_error_of_a_source_is_no_death(folder):
    """Only `BadRow` skips a row: a mistake in the program must not hide among broken files."""
    broken = stream(folder[0], 0)
    broken._task.read = lambda split, index, uniforms: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(broken)
    broken.close()
    assert not issubclass(BadRow, (ValueError, OSError, RuntimeError))
