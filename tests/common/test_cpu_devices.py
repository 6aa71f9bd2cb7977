"""One device a core by default, as many as the rows allow, and the number of before where a run goes on."""

import json
import os
import re
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from configs import digits
from src.build import rows_of
from src.common.mesh import distributed
from src.common.runtime import cores, cpu_devices

CONFIG = digits.get_config()  # 32, 24 and 32 rows


@pytest.fixture
def start(monkeypatch, tmp_path):
    """`cpu_devices.start` as in a fresh process on a machine of some cores: (the number that JAX was told, text)."""
    for name in (*distributed.NAMES, "JAX_DISTRIBUTED", "XLA_FLAGS", "JAX_NUM_CPU_DEVICES"):
        monkeypatch.delenv(name, raising=False)

    def run(have=2, asked=None, kept=None, workdir=tmp_path, training=True, memory=True, **changes):
        set_ = {}
        monkeypatch.setattr(cpu_devices, "physical_cores", lambda: have)
        monkeypatch.setattr(cpu_devices, "_has_memory", lambda count, config: memory)
        monkeypatch.setattr(jax.config, "update", set_.__setitem__)
        if kept is not None:
            (workdir / cpu_devices.FILE).write_text(
                kept if isinstance(kept, str) else json.dumps({"cpu_devices": kept})
            )
        config = CONFIG.copy_and_resolve_references()
        config.update_from_flattened_dict(changes)
        told = cpu_devices.start(config, rows_of(config), asked, workdir, training)
        return set_.get("jax_num_cpu_devices", 1), told

    return run


@pytest.mark.parametrize(
    "have, changes, count",
    [
        (1, {}, 1),
        (2, {}, 2),
        (3, {}, 2),
        (7, {}, 4),
        (64, {}, 8),
        (8, {"accumulate": 4}, 2),
        (8, {"batch": 77}, 7),  # 28, 21 and 28 rows
        (8, {"mesh.data": 4}, 4),
        (2, {"mesh.data": 4}, 1),  # refused where the mesh is made
        (8, {"mesh.data": 1, "mesh.fsdp": -1}, 1),  # collectives in loops
        (8, {"mesh.tensor": 2}, 1),
    ],
)
def test_as_many_as_the_cores_the_rows_and_the_mesh_allow(start, have, changes, count):
    assert start(have, **changes)[0] == count


def test_copies_of_a_large_model_leave_memory(start):
    assert start(8, memory=False) == (1, "1 CPU device, on 8 cores, since more copies of the model would leave little"
                                         " memory; --cpu_devices sets another number")  # fmt: skip
    tinyllama = {"width": 2048, "depth": 22, "mlp_width": 5632, "mot": ()}
    small, large = (cpu_devices._state_bytes(ConfigDict(sizes)) for sizes in (CONFIG.model.trunk, tinyllama))
    assert small < 3e8 and large > 20 * 1.1e9


def test_a_run_goes_on_with_the_number_of_before(start, tmp_path, caplog):
    assert start(8, kept=2) == (2, f"2 CPU devices, with which the run in {tmp_path} began; --cpu_devices sets another"
                                   " number")  # fmt: skip
    assert start(8, kept=2, asked=4)[0] == 4
    assert start(2, kept=8) == (2, f"2 CPU devices, not 8, with which the run in {tmp_path} began, since this machine"
                                   " has 2 cores; --cpu_devices sets another number")  # fmt: skip
    assert "that does not fit this config" in start(8, kept=5)[1]
    assert not caplog.records
    for wrong in ('{"cpu_devices": "two"}', "[" * 500, "{}"):
        assert start(4, kept=wrong)[0] == 4
        assert caplog.records.pop().levelname == "WARNING"


def test_a_run_that_keeps_no_number_began_with_one(start, tmp_path):
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    assert start(4)[0] == 1
    assert start(4, training=False)[0] == 4
    assert start(4, asked=2)[0] == 2


@pytest.mark.parametrize(
    "asked, changes, said",
    [
        (0, {}, "--cpu_devices=0 is no number of devices: give at least 1"),
        (3, {}, "--cpu_devices=3 does not divide the 32 rows of the task caption_to_image: give 1 or 2 or 4 or 8, or"),
        (8, {"accumulate": 2}, "the 24 rows of the task image_to_caption in 2 microbatches: give 1 or 2 or 4, or"),
        (3, {"mesh.data": 2}, "--cpu_devices=3 does not fit mesh (data=2, fsdp=1) of the config: give 2, or set"),
        (3, {"mesh.tensor": 2}, "--cpu_devices=3 does not fit mesh (data=-1, fsdp=1, tensor=2) of the config: give a"),
    ],
)
def test_a_number_that_cannot_be_is_one_sentence(start, asked, changes, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        start(2, asked=asked, **changes)


def test_a_crowd_is_a_warning(start, caplog):
    assert start(1, asked=8)[0] == 8
    assert "--cpu_devices=8 is more than 4 devices for each core" in caplog.text


def test_a_number_of_the_environment_stays(start, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=4")
    assert start(2) == (1, "4 CPU devices, XLA_FLAGS says so"), "JAX is told nothing"
    with pytest.raises(ValueError, match="--cpu_devices=2, but XLA_FLAGS sets 4 devices: leave out one of the two"):
        start(2, asked=2)


def test_accelerators_and_other_processes_are_left_alone(start, monkeypatch):
    monkeypatch.setenv("JAX_DISTRIBUTED", "auto")
    assert start(2) == (1, "")
    monkeypatch.delenv("JAX_DISTRIBUTED")
    with monkeypatch.context() as patch:
        patch.setattr(cpu_devices, "_elsewhere", lambda: "this machine has an accelerator")
        assert start(2) == (1, "")
        with pytest.raises(ValueError, match="--cpu_devices=2 is for one process on CPUs, but this machine has"):
            start(2, asked=2)


def test_physical_cores(tmp_path, monkeypatch):
    """Four logical processors of three cores, in a group with a quota below one of the system."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 4, 9}, raising=False)
    assert cores.physical_cores(tmp_path) == 4, "nothing is known of them"
    for number, siblings in {0: "0,4", 1: "1,5", 4: "0,4", 9: "9"}.items():
        write(tmp_path / f"sys/devices/system/cpu/cpu{number}/topology/thread_siblings_list", siblings)
    assert cores.physical_cores(tmp_path) == 3
    write(tmp_path / "proc/self/cgroup", "0::/jobs/mine")
    write(tmp_path / "sys/fs/cgroup/jobs/mine/cpu.max", "max 100000")
    assert cores.physical_cores(tmp_path) == 3
    write(tmp_path / "sys/fs/cgroup/jobs/cpu.max", "250000 100000")
    assert cores.physical_cores(tmp_path) == 2
    write(tmp_path / "sys/fs/cgroup/jobs/mine/cpu.max", "50000 100000")
    assert cores.physical_cores(tmp_path) == 1
    write(tmp_path / "proc/self/cgroup", "4:cpu,cpuacct:/old")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_quota_us", "-1")
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_period_us", "100000")
    assert cores.physical_cores(tmp_path) == 3
    write(tmp_path / "sys/fs/cgroup/cpu,cpuacct/old/cpu.cfs_quota_us", "200000")
    assert cores.physical_cores(tmp_path) == 2


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def test_jax_has_the_devices_and_their_schedule_and_the_run_keeps_their_number(tmp_path):
    said = f"""
import os, sys
from configs import digits
from src.build import rows_of
from src.common.mesh import distributed, emulation
from src.common.runtime import cpu_devices
cpu_devices.physical_cores = lambda: 4
config = digits.get_config()
cpu_devices.start(config, rows_of(config), None, {str(tmp_path)!r}, True)
distributed.start()
cpu_devices.keep({str(tmp_path)!r})
import jax
assert emulation.ORDERED in os.environ["XLA_FLAGS"]
print(jax.device_count())
"""
    env = {name: value for name, value in os.environ.items() if name not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run([sys.executable, "-c", said], env=env, capture_output=True, text=True)
    assert done.stdout == "4\n", done.stderr
    assert json.loads((tmp_path / cpu_devices.FILE).read_text()) == {"cpu_devices": 4}
