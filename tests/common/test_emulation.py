"""Emulated devices get the schedule in which they meet in one order; nobody else does."""

import os
import subprocess
import sys

import pytest

from src.common.mesh import distributed, emulation

EIGHT = "--xla_force_host_platform_device_count=8"


@pytest.mark.parametrize(
    ("given", "set_"),
    [
        (EIGHT, f"{EIGHT} {emulation.ORDERED}"),
        (f"{EIGHT} --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_DEFAULT", None),  # chosen by the user
        (f"{EIGHT} --xla_force_host_platform_device_count=1", None),
        ("--xla_dump_to=here", None),
    ],
)
def test_only_several_emulated_devices_are_scheduled_for_one_order(given, set_, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", given)
    distributed.start()
    assert os.environ["XLA_FLAGS"] == (set_ or given)


def test_a_process_among_others_is_scheduled_too_where_it_runs_on_a_cpu(monkeypatch):
    for name, value in zip(distributed.NAMES, ("127.0.0.1:1", "2", "0"), strict=True):
        monkeypatch.setenv(name, value)
    for name in ("jax.distributed.initialize", "jax.config.update", "atexit.register"):
        monkeypatch.setattr(name, lambda *args, **options: None)
    monkeypatch.setenv("XLA_FLAGS", "")
    distributed.start()
    assert os.environ["XLA_FLAGS"] == emulation.ORDERED


def test_devices_that_jax_itself_is_told_of_are_scheduled_too():
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"JAX_NUM_CPU_DEVICES": "2"}
    said = "import os; from src.common.mesh import distributed; distributed.start(); print(os.environ['XLA_FLAGS'])"
    done = subprocess.run([sys.executable, "-c", said], env=env, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == emulation.ORDERED
