"""Leaves from elsewhere are read once, whatever devices they go to, and are there as they were."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from src.common.files.checksums import fingerprint
from src.common.files.lazy_arrays import LazyArrays, place
from src.common.mesh.sharding import make_mesh
from src.train import init_from

STACK, TABLE = "trunk/layers/mlp/up/kernel", "text/table/embedding"
rng = np.random.default_rng(0)
LEAVES = {STACK: rng.normal(size=(3, 8, 16)), TABLE: rng.normal(size=(16, 8))}
LEAVES = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in LEAVES.items()}


class Counted(LazyArrays):
    """Counts what is read."""

    read = 0

    def blocks(self, path):
        for block in super().blocks(path):
            self.read += block.size
            yield block.T.copy().T  # not in C order, as kernels of published files


@pytest.mark.parametrize(
    ("path", "spec"),
    [
        (STACK, (None, None, ("data", "fsdp"))),
        (STACK, (None, "fsdp", "data")),
        (STACK, (None, "fsdp")),
        (STACK, ()),
        (STACK, None),
        (TABLE, ("fsdp",)),
        (TABLE, (None, "fsdp")),
        (TABLE, ("fsdp", "data")),
        (TABLE, None),
    ],
)
def test_a_leaf_is_read_once_and_summed_in_parts(path, spec, monkeypatch):
    mesh = make_mesh({"data": 2, "fsdp": 4})
    leaves, value = Counted(LEAVES), LEAVES[path]
    sharding = None if spec is None else NamedSharding(mesh, PartitionSpec(*spec))
    placed = place(leaves, path, jnp.float32, sharding)
    assert leaves.read == value.size and placed.dtype == jnp.float32
    assert sharding is None or placed.sharding.is_equivalent_to(sharding, placed.ndim)
    np.testing.assert_array_equal(placed, value.astype(np.float32))
    monkeypatch.setattr(init_from, "LARGE", 1)
    monkeypatch.setattr(init_from, "PART", 20)
    axis, parts = init_from._parts_of(placed)
    assert (parts == 1) == (spec == ("fsdp", "data")), "both of its axes are shared"
    assert parts == 1 or not (spec and len(spec) > axis and spec[axis])
    (found,) = init_from._sums({path: placed}, ((path, "bfloat16", axis, parts),)).values()
    assert int(found) == int(fingerprint(jnp.asarray(value)))


def test_a_stack_is_not_split_into_blocks():
    sharding = NamedSharding(make_mesh({"data": 8}), PartitionSpec("data"))
    with pytest.raises(ValueError, match="splits blocks from each other"):
        place(LazyArrays({STACK: np.zeros((8, 2), np.float32)}), STACK, jnp.float32, sharding)
