"""Fault 33: the processes, or the devices of one, hold different copies of what should be one state."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_processes import folder, logged, said, start  # noqa: F401 - fixtures

from src.train.checkpoints import replicas


def state(broken=None):
    """One leaf on all devices, one split over `fsdp`, one of each copy; `broken` names a leaf and a device."""
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("data", "fsdp"))
    specs = {"whole": PartitionSpec(), "split": PartitionSpec("fsdp"), "step": PartitionSpec()}
    values = {"whole": np.arange(6.0, dtype=np.float32), "split": np.arange(8.0, dtype=np.float32), "step": np.int32(3)}
    out = {}
    for name, value in values.items():
        sharding = NamedSharding(mesh, specs[name])
        shards = []
        for device, index in sharding.addressable_devices_indices_map(np.shape(value)).items():
            piece = np.array(value[index] if np.ndim(value) else value)
            if broken == (name, device.id):
                piece.reshape(-1).view(np.uint32)[-1] ^= 1  # the lowest bit
            shards.append(jax.device_put(piece, device))
        out[name] = jax.make_array_from_single_device_arrays(np.shape(value), sharding, shards)
    return {"params": out}


def test_one_bit_of_one_copy_is_found_and_named():
    replicas.check_replicas(state(), {"task": 3}, 5)
    for name in ("whole", "split", "step"):
        for device in (0, 5):
            with pytest.raises(RuntimeError, match=rf"differ at step 5 in params/{name} \(devices of process 0\)"):
                replicas.check_replicas(state((name, device)), {"task": 3}, 5)
    replicas.check_replicas({"params": {"w": jnp.ones(3)}, "opt_state": ()}, None, 0)


def test_another_process_is_named(monkeypatch):
    """What the other one tells is this one's text with another fingerprint, or another place in the data."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for old, new, named in (
        ("[3]", "[4]", "the position"),
        ('"params/whole": [', '"params/whole": [7', "params/whole"),
    ):

        def gather(text, old=old, new=new):
            other = text.replace(old, new) if text.startswith("{") else text + "0"
            return [text, other]

        monkeypatch.setattr(replicas, "gather_texts", gather)
        with pytest.raises(RuntimeError, match=rf"in {named}.* \(process 1\): nothing was saved"):
            replicas.check_replicas(state(), [3], 5)


DRIFT = """
import jax, numpy as np
from src.train import loop
advance = loop.Run.advance
def drift(self):
    advance(self)
    if self.step == 3:
        def other(x):
            shards = [jax.device_put(np.asarray(s.data) + np.float32(1e-3), s.device) for s in x.addressable_shards]
            return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)
        fields = dict(self.state.params["fields"])
        fields["text"] = fields["text"] | {"head": jax.tree.map(other, fields["text"]["head"])}
        self.state = self.state.replace(params=self.state.params | {"fields": fields})
loop.Run.advance = drift
"""
SKIPS = """
from src.train import loop
train = loop.open_data
def skipping(*arguments):
    data = train(*arguments)
    next(data)
    return data
loop.open_data = skipping
"""


@pytest.mark.faults
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "before, step, named", [(DRIFT, 4, "params/fields/text/head/"), (SKIPS, 0, "the position in the data")]
)
def test_two_processes_that_drift_apart_stop_before_they_save(folder, start, before, step, named):  # noqa: F811
    pair = start("--config.steps=1000000", "--config.checkpoint.every=2", "--config.mesh.data=8", before=("", before))
    assert [p.wait(240) for p in pair] == [1, 1], said(folder, 0) + said(folder, 1)
    for index in range(2):
        last = [line for line in said(folder, index).splitlines() if line.startswith("error: ")][-1]
        assert f"differ at step {step} in " in last and named in last and "(process 1)" in last
    saved = [p.name for p in (folder / "run" / "checkpoints").iterdir()] if step else []
    assert saved == (["2"] if step else []), "what differs was not saved"
