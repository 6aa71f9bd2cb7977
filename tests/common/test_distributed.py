"""Who takes part, who reads which rows, and how processes that differ are told; test_processes.py has real ones."""

import glob
import json
import os
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from src.common.mesh import distributed, sharding
from src.data.pipeline.stream import Stream
from src.interfaces import Batch

ROOT = pathlib.Path(__file__).parents[2]
ADDRESS, COUNT, INDEX = distributed.NAMES


@pytest.mark.parametrize(
    "environment, said",
    [
        ({ADDRESS: "a:1", COUNT: "2"}, f"{ADDRESS}, {COUNT} is set without {INDEX}"),
        ({ADDRESS: "a", COUNT: "2", INDEX: "0"}, f"{ADDRESS}='a' is no host:port"),
        ({ADDRESS: "a:1", COUNT: "2", INDEX: "2"}, f"{INDEX}=2 is not below {COUNT}=2"),
        ({ADDRESS: "a:1", COUNT: "two", INDEX: "0"}, f"{COUNT}='two' is no whole number of at least 1"),
        ({"JAX_DISTRIBUTED": "auto", COUNT: "2"}, "JAX_DISTRIBUTED=auto is set beside JAX_NUM_PROCESSES"),
        ({"JAX_DISTRIBUTED": "yes"}, "JAX_DISTRIBUTED='yes' is unknown"),
        ({"JAX_DISTRIBUTED": "auto", "JAX_HEARTBEAT_TIMEOUT": "0"}, "JAX_HEARTBEAT_TIMEOUT='0' is no whole number"),
    ],
)
def test_a_wrong_environment_is_one_sentence(environment, said, monkeypatch):
    for name in (*distributed.NAMES, "JAX_DISTRIBUTED", "JAX_HEARTBEAT_TIMEOUT"):
        monkeypatch.delenv(name, raising=False)
    distributed.start()  # nothing is set: one process
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"^{said}"):
        distributed.start()


def test_the_environment_becomes_arguments(monkeypatch):
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: given.append(arguments))
    monkeypatch.setattr(distributed.atexit, "register", lambda function: None)
    monkeypatch.setattr(distributed.os, "environ", {"JAX_DISTRIBUTED": "auto", "JAX_HEARTBEAT_TIMEOUT": "20"})
    distributed.start()
    monkeypatch.setattr(distributed.os, "environ", {ADDRESS: "[::1]:80", COUNT: "3", INDEX: "2"})
    distributed.start()
    auto, named = given
    assert auto == {"initialization_timeout": 300, "heartbeat_timeout_seconds": 20}
    assert (named["coordinator_address"], named["num_processes"], named["process_id"]) == ("[::1]:80", 3, 2)


def mesh_of(processes, **axes):
    """A mesh of devices that belong to these processes."""
    devices = np.array([types.SimpleNamespace(process_index=p) for p in processes], object)
    return types.SimpleNamespace(devices=devices.reshape(tuple(axes.values())), axis_names=tuple(axes), shape=axes)


@pytest.mark.parametrize(
    "mesh, groups",
    [
        (mesh_of([0, 0, 1, 1], data=2, fsdp=2), [(0, 1), (2, 3)]),
        (mesh_of([1, 0, 1, 0], data=4, fsdp=1), [(0, 2), (1, 3)]),
        (mesh_of([0, 0, 1, 1], data=1, fsdp=2, tensor=2, context=1), [(0,), (1,)]),
        (mesh_of([0, 0, 1, 1], fsdp=1, tensor=4), [(0,)]),
        (mesh_of([0, 0, 1, 1, 2, 2, 3, 3], data=2, fsdp=1, tensor=4), [(0,), (1,)]),
        (mesh_of([0, 1, 0, 1], data=2, tensor=2), [(0, 1)]),
        (mesh_of([0, 0, 0, 1, 1, 1], data=3, tensor=2), [(0, 1, 2)]),  # both have a part of the middle block
    ],
)
def test_which_rows_a_process_reads_follows_from_the_mesh(mesh, groups, monkeypatch):
    for process in {device.process_index for device in mesh.devices.flat}:
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found, mine = distributed.row_blocks(mesh)
        assert found == groups
        for place, device in np.ndenumerate(mesh.devices):
            at = dict(zip(mesh.axis_names, place, strict=True))
            block = at.get("data", 0) * mesh.shape.get("fsdp", 1) + at.get("fsdp", 0)
            assert device.process_index != process or block in groups[mine]
        assert distributed.data_shard(mesh) == ((mine, len(groups)), tuple(b for group in groups for b in group))


def test_rows_of_scattered_blocks_are_those_of_the_whole_batch():
    order, source = (0, 2, 1, 3), Numbers()
    whole = Stream(source, 8, seed=3)
    shares = [Stream(source, 8, seed=3, shard=(i, 2), order=order) for i in range(2)]
    for stream in (whole, *shares):
        stream.set_state(24)
    for _ in range(3):
        rows = next(whole).cond["row"].reshape(4, 2)
        parts = [next(share).cond["row"].reshape(2, 2) for share in shares]
        assert np.array_equal(parts[0], rows[[0, 2]]) and np.array_equal(parts[1], rows[[1, 3]])


class Numbers:
    """A task whose rows are their numbers."""

    draws = 0

    def rows(self, split):
        """Of any split."""
        return 50

    def read(self, split, index, uniforms):
        """The number."""
        return {"row": np.asarray(index)}

    def blank(self):
        """No row is bad."""
        raise AssertionError

    def build(self, rows):
        """The numbers, as conditions."""
        return Batch({}, cond=rows)


def test_processes_that_differ_are_told(monkeypatch):
    facts = {"config.seed": 0, "jax": "1.0", "config.tasks": ["a"]}
    distributed.check_same(facts)
    other = facts | {"config.seed": 1, "flax": "2"}
    monkeypatch.setattr(distributed, "gather_texts", lambda text: [text, text, json.dumps(other)])
    with pytest.raises(ValueError) as caught:
        distributed.check_same(facts)
    assert str(caught.value) == (
        "the processes differ in config.seed (0 on process 0, 1 on process 2), flax (None on process 0, '2' on process"
        " 2): start all with the same command and packages"
    )


def test_batch_is_split_over_all_devices():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    batch = {"task": Batch({}, {"label": np.arange(16)}), "image": np.arange(48.0, dtype=np.float32).reshape(16, 3)}
    placed = distributed.put_batch(batch, mesh)
    assert np.array_equal(placed["task"].cond["label"], np.arange(16)) and np.array_equal(
        placed["image"], batch["image"]
    )
    shards = placed["image"].addressable_shards
    assert len({s.device for s in shards}) == 8 and all(s.data.shape == (2, 3) for s in shards)


def test_batch_that_does_not_divide_is_refused():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=r"'task/cond/label' of shape \(12,\) has 12 rows .* multiple of 8"):
        distributed.put_batch({"task": Batch({}, {"label": np.arange(12)})}, mesh)


@pytest.mark.parametrize("call", ["start", "skip_absent_tpu"])
def test_an_absent_tpu_is_not_looked_for(call):
    """libtpu would tell on standard error, long, that it finds none."""
    if glob.glob("/dev/nvidia[0-9]*") or glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"):
        pytest.skip("there are accelerators here")
    text = f"from src.common.mesh import distributed as d; d.{call}(); import jax; print(jax.devices()[0].platform)"
    env = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    done = subprocess.run([sys.executable, "-c", text], env=env, cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("cpu\n", "")
