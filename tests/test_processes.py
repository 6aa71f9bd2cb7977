"""Two real processes of four devices each do what one process does, and what one device does."""

import json
import pathlib
import re
import signal
import time

import jax
import numpy as np
import pytest

from src.common.mesh.distributed import put_batch
from src.common.runtime.writers import Many
from src.train import loop
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.trainer import make_trainer, open_data
from tests.helpers.processes import TORUS, folder, logged, said, start, system  # noqa: F401 - fixtures

ROOT = pathlib.Path(__file__).parents[1]
# A process that cannot read step 4.
BLIND = """
import orbax.checkpoint as ocp
read = ocp.PyTreeCheckpointHandler.restore
def restore(self, directory, *arguments, **options):
    if directory.parent.name == "4":
        raise OSError("a broken disk")
    return read(self, directory, *arguments, **options)
ocp.PyTreeCheckpointHandler.restore = restore
"""


class Losses(Many):
    """A writer that keeps the losses."""

    def __init__(self):
        super().__init__([])
        self.seen = []

    def write_scalars(self, step, scalars):
        self.seen.append((step, scalars["loss"]))


def alone(folder):  # noqa: F811
    """Losses of five steps on one device, and the state after four."""
    trainer = make_trainer(system(folder, mesh={"data": 1, "fsdp": 1}), jax.devices()[:1])
    state, update, data, losses = trainer.init(), trainer.compile(), open_data(trainer), []
    for step in range(1, 6):
        state, measured = update(state, put_batch(next(data), trainer.mesh))
        losses.append((step, float(measured.terms["total"].total)))
        if step == 4:
            kept = jax.device_get(state)
    data.close()
    return losses, kept


@pytest.mark.faults
def test_processes_share_one_run(folder, start):  # noqa: F811
    """Steps 1 and 2 in two processes, 3 and 4 in this one, 4 and 5 in two processes again, one of which then dies."""
    pair = start("--config.mesh.data=4", "--config.mesh.fsdp=2", before=(TORUS, TORUS))
    losses, state = alone(folder)
    assert [process.wait(240) for process in pair] == [0, 0], said(folder, 0) + said(folder, 1)
    np.testing.assert_allclose(logged(folder), losses[:2], rtol=2e-4)
    assert json.loads((folder / "run" / "metrics.json").read_text())["steps"] == 2
    assert "step 2/2" in said(folder, 0) and "caption_accuracy" in said(folder, 0)
    told = re.findall(r"^[IWEF]\d{4} .*", said(folder, 1), re.MULTILINE)
    assert len(told) == 1 and "waits up to 300 s for the others" in told[0] and "caption_acc" not in said(folder, 1)
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1

    trainer = make_trainer(system(folder, mesh={"data": 2, "fsdp": 4}, steps=4))
    checkpoints, writer = Checkpointer(folder / "run", keep=4, every=1), Losses()
    reached, _ = loop.train(trainer, checkpoints, writer, time.monotonic())
    checkpoints.close()
    np.testing.assert_allclose(writer.seen, losses[2:4], rtol=2e-4)
    assert int(reached.step) == 4
    for ours, theirs in zip(jax.tree.leaves(reached.params), jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(np.asarray(ours), theirs, rtol=2e-4, atol=2e-6)

    # The axis `tensor` spans both processes: they read the same rows.
    pair = start("--config.mesh.data=1", "--config.mesh.tensor=8", "--config.steps=1000000", before=("", BLIND))
    waited = time.monotonic()
    while len(logged(folder)) < 4 and time.monotonic() - waited < 240 and not any(p.poll() for p in pair):
        time.sleep(0.1)
    pair[1].send_signal(signal.SIGKILL)
    assert pair[0].wait(60) != 0, "it noticed"
    np.testing.assert_allclose(logged(folder)[2:4], losses[3:5], rtol=2e-4)
    assert [p.name for p in (folder / "run" / "damaged").iterdir()] == ["4-0"]
    for index in range(2):
        assert "state: on process 1: OSError: a broken disk" in said(folder, index)
