"""A save copies to the host what the process itself holds, once, and never gathers the state."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, sys, jax
from src.common.mesh import distributed
distributed.start()
from src.common.mesh.sharding import make_mesh
from src.tools.benchmarks.save import measure_saves, random_state
found = measure_saves(random_state(0.25, make_mesh({"data": 1, "fsdp": 8})), sys.argv[1], count=2)
print(json.dumps(found))
distributed.stop()
"""


@pytest.mark.faults
def test_two_processes_copy_a_half_each(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
    }
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    pair = [
        subprocess.Popen(command, cwd=ROOT, env=env | {"JAX_PROCESS_ID": str(i)}, stdout=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    try:
        told = [process.communicate(timeout=240)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    for text in told:
        found = json.loads(text.strip().splitlines()[-1])
        print(found)
        assert found["state_bytes"] == 2**28 and found["local_share"] == 0.5
        assert 0.2 < found["peak_share"] < 0.75, "half the state, and not all of it"
