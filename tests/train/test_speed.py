"""Speed and memory of a log line, by a clock that the test sets."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.common.mesh.peaks import bf16_peak
from src.common.mesh.sharding import make_mesh
from src.common.runtime import memory
from src.interfaces import LossTerm
from src.tools.compile.chips import CHIPS
from src.train import flops, metrics, skip_nonfinite
from src.train.step import StepMetrics
from tests.helpers.numbers import bare


def test_speed_is_that_of_the_steps_without_pauses(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(metrics.time, "monotonic", lambda: now[0])
    meter = metrics.Metrics(bare(), lambda step: 0.0, at_peak=0.5)
    meter.tokens = 300
    now[0] = 130.0
    meter.paused(50.0)  # it began before the line did
    measured = StepMetrics({"total": LossTerm(np.float32(1), np.float32(1))}, {}, skip_nonfinite.new_guard())
    for _ in range(4):
        now[0] += 1.0
        meter.waited(0.5)
        meter.add(measured)
    now[0] += 3.0
    meter.paused(3.0)
    now[0] += 1.0
    told = meter.flush(4)
    expected = {"step_seconds": 1.25, "mfu": 0.4, "data_wait": 0.4, "tokens_per_second": 240.0}
    assert {name: told[name] for name in expected} == pytest.approx(expected)
    assert 0.05 < told["process_memory_gib"] < 64 and set(memory.MEMORY) <= set(metrics.CLOCK)
    meter.at_peak = None
    meter.add(measured)
    assert "mfu" not in meter.flush(5), "where no peak is known"
    assert "step_seconds" not in meter.flush(5), "where no step was taken"


def test_memory_is_that_of_the_fullest_device_where_devices_tell(monkeypatch):
    devices = [types.SimpleNamespace(memory_stats=lambda n=n: {"peak_bytes_in_use": n << 30}) for n in (3, 7, 5)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert memory.memory_in_use() == {"device_memory_gib": 7.0}


def test_peaks_are_known_by_the_names_of_devices():
    known = {"TPU v4": 275, "TPU v5 lite": 197, "TPU v5": 459, "TPU v6 lite": 918, "TPU7x": 1153.5}
    known |= {"NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312, "NVIDIA H200": 989}
    assert {kind: bf16_peak(kind) for kind in known} == {kind: tera * 1e12 for kind, tera in known.items()}
    for other in ("cpu", "TPU v3", "NVIDIA H100 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", ""):
        assert bf16_peak(other) is None
    assert [CHIPS[name].flops for name in ("v5e", "tpu7x")] == [197e12, 2307e12]


def test_a_step_at_the_peak_takes_its_operations_over_all_devices(monkeypatch):
    system, mesh = bare(), make_mesh({"data": 8})
    monkeypatch.setattr(flops, "step_flops", lambda system: {"attention": 1e9, "total": 4e9})
    assert flops.seconds_at_peak(system, mesh, jnp.bfloat16) is None, "of this device no peak is published"
    monkeypatch.setattr(flops, "bf16_peak", lambda kind: 1e9)
    assert flops.seconds_at_peak(system, mesh, jnp.dtype("bfloat16")) == 0.5
    assert flops.seconds_at_peak(system, mesh, jnp.dtype("float32")) is None

    def unknown(system):
        raise ValueError("nothing says what it acts on")

    monkeypatch.setattr(flops, "step_flops", unknown)
    assert flops.seconds_at_peak(system, mesh, jnp.bfloat16) is None
