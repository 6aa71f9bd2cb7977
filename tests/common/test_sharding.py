"""Meshes that fit, arrays cut where they should be, batches whole again on the devices."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from src.common.mesh import sharding


def test_mesh_sizes():
    mesh = sharding.make_mesh({"data": -1, "fsdp": 4})
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4} and set(mesh.axis_types) == {AxisType.Auto}
    assert dict(sharding.make_mesh({"data": 1, "fsdp": -1}, jax.devices()[:1]).shape) == {"data": 1, "fsdp": 1}
    with pytest.raises(
        ValueError,
        match=r"^mesh \(data=-1, fsdp=3\) does not fit 8 cpu devices .*: set mesh.data to -1, and mesh.fsdp to",
    ):
        sharding.make_mesh({"data": -1, "fsdp": 3})
    with pytest.raises(ValueError, match=r"mesh \(data=2, fsdp=2\) does not fit 8 cpu devices"):
        sharding.make_mesh({"data": 2, "fsdp": 2})
    with pytest.raises(ValueError, match="has an axis 'model'; the axes are data, fsdp, tensor, context"):
        sharding.make_mesh({"data": -1, "model": 2})
    for axes in ({"data": -1, "fsdp": -1}, {"data": 0, "fsdp": 8}, {}):
        with pytest.raises(ValueError, match="needs positive axis sizes"):
            sharding.make_mesh(axes)


def specs(shapes, mesh, **rules):
    tree = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, jnp.float32), shapes, is_leaf=lambda s: isinstance(s, tuple))
    return jax.tree.map(lambda s: s.spec, sharding.ShardingRules(**rules).shardings(tree, mesh))


def test_parameters_are_cut_by_size():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    shapes = {
        "layers": {"kernel": (64, 32, 48), "deep": (4096, 2, 3), "scale": (8, 16)},
        "embed": (100, 64),
        "square": (64, 64),
        "odd": (101, 63),
        "small": (8, 8),
        "step": (),
    }
    assert specs(shapes, mesh, min_size=1024) == {
        "layers": {"kernel": P(None, None, "fsdp"), "deep": P(), "scale": P()},
        "embed": P("fsdp"),
        "square": P("fsdp"),
        "odd": P(),
        "small": P(),
        "step": P(),
    }
    assert specs(shapes, mesh)["embed"] == P()
    alone = sharding.make_mesh({"data": 8, "fsdp": 1})
    assert set(jax.tree.leaves(specs(shapes, alone, min_size=1), is_leaf=lambda s: isinstance(s, P))) == {P()}


def test_states_of_processes_are_whole_on_every_device():
    """Of any size; parameters of a field called `states` are cut as all others."""
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4})
    shapes = {
        "extra": {"states": {"text": {"table": (32, 4096)}}},
        "params": {"fields": {"states": {"table": (32, 4096)}}},
    }
    assert specs(shapes, mesh) == {
        "extra": {"states": {"text": {"table": P()}}},
        "params": {"fields": {"states": {"table": P(None, "fsdp")}}},
    }


def test_tensor_goes_by_rule_and_fsdp_takes_what_is_left():
    mesh = sharding.make_mesh({"data": 1, "fsdp": 4, "tensor": 2})
    rules = {"tensor": (("up/", -1), ("down/kernel", -2), ("table", 0)), "min_size": 1}
    shapes = {
        "layers": {"up": {"kernel": (3, 8, 64), "bias": (3, 64)}, "down": {"kernel": (3, 64, 8), "bias": (3, 8)}},
        "table": (64, 8),
        "odd/table": (63, 8),  # what tensor does not divide is fsdp's
        "mu/layers/down/kernel": (3, 8),  # a factored moment: the axis would be the layers'
    }
    assert specs(shapes, mesh, **rules) == {
        "layers": {
            "up": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
            "down": {"kernel": P(None, "tensor", "fsdp"), "bias": P(None, "fsdp")},
        },
        "table": P("tensor", "fsdp"),
        "odd/table": P(None, "fsdp"),
        "mu/layers/down/kernel": P(None, "fsdp"),
    }


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("up/(", -1),), "is no regex"),
        ((("up/", 7),), r"splits axis 7 by 'up/', but up/kernel is \(8, 64\)"),
        ((("nothing", -1),), "mesh.tensor=2 splits no parameter"),
    ],
)
def test_rules_that_mean_nothing_are_refused(rules, message):
    mesh = sharding.make_mesh({"data": 4, "tensor": 2})
    shapes = {"up": {"kernel": jax.ShapeDtypeStruct((8, 64), jnp.float32)}}
    with pytest.raises(ValueError, match=message):
        sharding.ShardingRules(rules).check(shapes, mesh)
