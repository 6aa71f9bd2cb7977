"""Initial weights come into the memory of the host a block at a time."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PROGRAM = """
import json, sys, jax, numpy as np
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from src.common.files.lazy_arrays import place
from src.common.mesh.sharding import make_mesh
from src.models.pretrained.initial_weights import Initial, write_initial
from src.train import init_from

PATH, TABLE, SHAPE = "trunk/layers/mlp/up/kernel", "fields/text/embed/table/embedding", (32, 2048, 1024)

class Made:
    shapes = {PATH: jax.ShapeDtypeStruct(SHAPE, jnp.bfloat16), TABLE: jax.ShapeDtypeStruct((32768, 2048), jnp.bfloat16)}

    def blocks(self, path):
        one = np.ones(self.shapes[path].shape[path == PATH:], jnp.bfloat16)
        yield from (one for _ in range(SHAPE[0] if path == PATH else 1))

def memory(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))

write_initial(sys.argv[1], Made(), {})
mesh, found, told = make_mesh({"fsdp": 8}), Initial(sys.argv[1]), {}
for path, spec in ((PATH, (None, None, "fsdp")), (TABLE, ("fsdp",))):
    sharding = NamedSharding(mesh, PartitionSpec(*spec))
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    leaf = place(found, path, jnp.float32, sharding)
    told[path] = [leaf.nbytes, memory("VmHWM") - before]
    open("/proc/self/clear_refs", "w").write("5")
    before = memory("VmRSS")
    found.check(init_from._prints({path: leaf}, found))
    told[path].append(memory("VmHWM") - before)
    del leaf
print(json.dumps(told))
"""


@pytest.mark.faults
def test_a_leaf_takes_its_own_memory_and_that_of_a_block(tmp_path):
    """Of 256 MB each, from bfloat16: a stack of 32 blocks on 8 devices, and a table, which is one block."""
    env = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (stack, table) = json.loads(done.stdout.strip().splitlines()[-1]).values()
    print(stack, table)
    size, placing, summing = stack
    assert size == 2**28 and placing < 1.4 * size and summing < 0.25 * size
    size, placing, summing = table
    assert size == 2**28 and placing < 1.8 * size and summing < 0.25 * size, "the file's half of it is mapped, too"
