"""One run on ever other devices, processes and meshes: the same rows in the same order, and the same numbers."""

import hashlib
import json
import math
import time

import jax
import numpy as np
import pytest

from src.build import build_system
from src.common.mesh.distributed import put_batch, to_host
from src.common.runtime.writers import JsonLinesWriter, Many
from src.common.tree import flatten
from src.train import loop
from src.train import trainer as trainer_module
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.trainer import make_trainer, open_data
from tests.helpers.processes import TORUS, folder, logged, said, start, system  # noqa: F401 - fixtures
from tests.helpers.runs import close, config_of
from tests.helpers.runs import logged as lines

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1500)]
STEPS = 10
# (data, fsdp, tensor, context), what else changes, and how far this part of the run goes.
LEGS = (
    ((8, 1, 1, 1), {}, 2),
    ((2, 2, 1, 1), {"sharding.min_size": 64}, 4),
    ((1, 1, 1, 1), {"accumulate": 2}, 5),
    ((1, 2, 2, 2), {"data.workers": 2}, 7),
    ((1, 1, 8, 1), {"log.every": 3}, 8),
    ((1, 1, 1, 1), {"data.workers": 1, "checkpoint.every": 1}, 10),
)
# Has every process note, in its folder, the rows that the devices get, and what a save sends to the others.
SEEN = """
import hashlib, json, sys
import numpy as np
from jax.experimental import multihost_utils
from src.common.mesh import distributed
from src.train import trainer
from src.train.checkpoints.checkpointer import Checkpointer

FOLDER = next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2] + "/.."
put, gather, save = trainer.put_batch, multihost_utils.process_allgather, Checkpointer.save
sizes = []

def note(name, value):
    import jax
    with open(f"{FOLDER}/{name}.{jax.process_index()}", "a") as file:
        file.write(json.dumps(value) + "\\n")

def seen(batch, mesh):
    import jax
    found = put(batch, mesh)
    rows = [distributed.to_host(leaf).tobytes() for leaf in jax.tree.leaves(found)]
    note("rows", hashlib.sha256(b"".join(rows)).hexdigest())
    return found

def sized(value, **options):
    found = gather(value, **options)
    sizes.append(np.asarray(found).nbytes)
    return found

def watched(self, step, state, *rest):
    import jax
    del sizes[:]
    saved = save(self, step, state, *rest)
    leaves = jax.tree.leaves(state)
    here = sum(s.data.nbytes for leaf in leaves for s in leaf.addressable_shards)
    note("saves", {"step": step, "gathered": max(sizes), "here": here, "all": sum(leaf.nbytes for leaf in leaves)})
    return saved

trainer.put_batch, multihost_utils.process_allgather, Checkpointer.save = seen, sized, watched
"""


def digest(batch):
    return hashlib.sha256(b"".join(to_host(leaf).tobytes() for leaf in jax.tree.leaves(batch))).hexdigest()


def leg(path, monkeypatch, mesh, changes, steps):
    """Trains up to `steps`: the rows of every batch by task, and what the devices got of them."""
    sizes = {f"mesh.{axis}": size for axis, size in zip(("data", "fsdp", "tensor", "context"), mesh, strict=True)}
    fixed = {"model.trunk.kv_heads": 2, "optim.steps": STEPS, "fields.text.codec.vocab_size": 200, "steps": steps}
    config = config_of(**fixed | sizes | changes)
    with config.unlocked():
        config.batch = 112
        del config.tasks["number_sentences"]
    trainer = make_trainer(build_system(config), jax.devices()[: math.prod(mesh)])
    rows, digests = [], []

    def watch(name, build):
        def watched(arrays):
            if len(next(iter(arrays.values()))) > 1:  # one row is asked for its shapes
                rows.append((name, digest(arrays)))
            return build(arrays)

        return watched

    for name, plan in trainer.system.tasks.items():
        monkeypatch.setattr(plan.task, "build", watch(name, plan.task.build))

    def put(batch, on):
        found = put_batch(batch, on)
        digests.append(digest(found))
        return found

    monkeypatch.setattr(trainer_module, "put_batch", put)
    checkpoints = Checkpointer(path, every=config.checkpoint.every)
    state, _ = loop.train(trainer, checkpoints, Many([JsonLinesWriter(path / "log.jsonl")]), 0.0)
    checkpoints.close()
    return jax.device_get(state), rows, digests


def test_eight_four_and_one_device_share_one_run(tmp_path, monkeypatch):
    """Six parts of a run, each on another mesh, with microbatches and data workers now and then."""
    state, rows, digests = leg(tmp_path / "alone", monkeypatch, (1, 1, 1, 1), {}, STEPS)
    assert len(set(digests)) == STEPS and len(rows) == 2 * STEPS
    seen, got = [], []
    for mesh, changes, steps in LEGS:
        reached, part, told = leg(tmp_path / "run", monkeypatch, mesh, changes, steps)
        seen, got = seen + part, got + told
        assert len(got) == steps == int(reached.step), "it went on, and did not start again"
    assert seen == rows and got == digests, "the same rows, in the same places"
    close(reached.params, state.params, rtol=0, atol=2e-4)
    close(reached.ema, state.ema, rtol=0, atol=2e-4)
    ours, theirs = ({line["step"]: line for line in lines(tmp_path / run)} for run in ("run", "alone"))
    for step in set(ours) & set(theirs) - {8}:  # the line of step 8 has two steps in it
        del ours[step]["update_norm"], theirs[step]["update_norm"]  # Adam magnifies roundings
        close(ours[step], theirs[step], rtol=2e-4, atol=1e-5)
    assert {1, 2, 4, 5, 7, 9, 10} <= set(ours)


def test_a_run_goes_on_bit_for_bit_on_as_many_devices_and_to_rounding_on_others(tmp_path, monkeypatch):
    """Two devices, as a machine of two cores has by default."""
    part = lambda name, devices, steps: leg(tmp_path / name, monkeypatch, (devices, 1, 1, 1), {}, steps)[0]
    whole = part("whole", 2, STEPS)
    for name, devices in (("same", 2), ("other", 1)):
        part(name, 2, 5)
        reached = part(name, devices, STEPS)
        assert int(reached.step) == STEPS
        if name == "same":
            jax.tree.map(np.testing.assert_array_equal, reached, whole)
        for ours, theirs in zip(lines(tmp_path / name), lines(tmp_path / "whole"), strict=True):
            close(ours["loss"], theirs["loss"], rtol=0 if name == "same" else 1e-5, atol=0)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def alone(path, steps):
    """Losses and digests of the batches on one device."""
    trainer = make_trainer(system(path, mesh={"data": 1, "fsdp": 1}), jax.devices()[:1])
    state, update, data, losses, digests = trainer.init(), trainer.compile(), open_data(trainer), [], []
    for step in range(1, steps + 1):
        batch = put_batch(next(data), trainer.mesh)
        digests.append(digest(batch))
        state, measured = update(state, batch)
        losses.append((step, float(measured.terms["total"].total)))
    data.close()
    return losses, digests, jax.device_get(state)


def test_two_one_and_two_processes_share_one_run(folder, start, monkeypatch):  # noqa: F811
    """Steps 1 and 2 in two processes, 3 and 4 in one, 5 and 6 in two; and each process saves what it has."""
    pair = start("--config.mesh.data=1", "--config.mesh.fsdp=8", before=(TORUS + SEEN,) * 2)
    losses, digests, state = alone(folder, 6)
    assert [process.wait(600) for process in pair] == [0, 0], said(folder, 0) + said(folder, 1)
    assert read(folder / "rows.0") == read(folder / "rows.1") == digests[:2]
    for index in range(2):
        (save,) = read(folder / f"saves.{index}")
        assert save["step"] == 2 and save["here"] < 0.7 * save["all"], "the state is split over the processes"
        assert save["gathered"] < 100 < 1e-3 * save["all"], "nothing of it went to another process"
        files = (folder / "run" / "checkpoints" / "2" / "state" / f"ocdbt.process_{index}").rglob("d/*")
        written = sum(p.stat().st_size for p in files)
        assert written > 0.3 * save["all"], "each wrote its half; there are names and indices besides"

    got = []
    monkeypatch.setattr(
        trainer_module, "put_batch", lambda b, mesh: got.append(digest(found := put_batch(b, mesh))) or found
    )
    trainer = make_trainer(system(folder, mesh={"data": 2, "fsdp": 1}, steps=4), jax.devices()[:2])
    checkpoints = Checkpointer(folder / "run")
    loop.train(trainer, checkpoints, JsonLinesWriter(folder / "run" / "log.jsonl"), time.monotonic())
    checkpoints.close()
    assert got == digests[2:4]

    pair = start("--config.mesh.data=2", "--config.mesh.tensor=4", "--config.steps=6", before=(SEEN, SEEN))
    assert [process.wait(600) for process in pair] == [0, 0], said(folder, 0) + said(folder, 1)
    assert read(folder / "rows.0")[2:] == read(folder / "rows.1")[2:] == digests[4:]
    np.testing.assert_allclose(logged(folder), losses, rtol=2e-4)
    trainer = make_trainer(system(folder, mesh={"data": 1, "fsdp": 1}, steps=6), jax.devices()[:1])
    reached = flatten(jax.device_get(Checkpointer(folder / "run").restore(trainer.abstract)[0].params))
    for path, leaf in flatten(state.params).items():
        np.testing.assert_allclose(reached[path], leaf, rtol=2e-4, atol=2e-5, err_msg=path)
