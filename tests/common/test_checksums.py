"""The checksum sees every bit and every exchange, and does not see the sharding."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.common.files.checksums import Running, copies, fingerprint, fingerprint_in_parts, fingerprints, on_device
from src.common.mesh.sharding import ShardingRules, make_mesh


def _mix(x):
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
    return x ^ (x >> 16)


def test_equals_the_definition_on_every_sharding():
    x = np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32)
    expected = sum(_mix(int(bits) ^ _mix(i)) for i, bits in enumerate(x.view(np.uint32).ravel())) % 2**32
    for axes in ({"data": 8, "fsdp": 1}, {"data": 2, "fsdp": 4}):
        mesh = make_mesh(axes)
        leaf = jax.device_put(x, ShardingRules(min_size=1).shardings(x, mesh))
        assert fingerprints({"x": leaf}) == {"x": expected}
        program = on_device.lower({"x": leaf}).compile().as_text()
        moved = set(re.findall(r"= (\S+?)(?:\{\S*)? (all-reduce|all-gather|all-to-all|collective-permute)\b", program))
        assert moved == ({("u32[]", "all-reduce")} if axes["fsdp"] > 1 else set()), "only sums leave a device"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_piece_by_piece_on_the_host_it_is_the_same(dtype, monkeypatch):
    monkeypatch.setattr("src.common.files.checksums.PIECE", 100)
    x = np.random.default_rng(0).normal(size=(7, 50)).astype(jnp.dtype(dtype))
    running = Running()
    for piece in (x[:2], x[2:2], x[2:]):
        running.add(piece)
    assert running.value() == int(fingerprint(jnp.asarray(x)))
    if dtype != "int8":  # and in parts, from a wider dtype
        stack = jnp.asarray(x, jnp.float32).reshape(7, 5, 10)
        in_parts = jax.jit(fingerprint_in_parts, static_argnums=(1, 2, 3))
        for axis, parts in ((0, 7), (1, 5), (2, 2)):
            assert int(in_parts(stack, dtype, axis, parts)) == running.value()
    assert Running().add(x.T.copy()).value() != running.value() == Running().add(x.T.copy().T).value()


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "int8", "uint32", "bool", "complex64", "float8_e4m3fn", "int4"]
)
def test_sees_single_bits_and_exchanges(dtype):
    x = jnp.asarray(np.arange(6) % 2).astype(dtype)
    seen = {int(fingerprint(x.at[i].set(x[i - 1]))) for i in range(6)} | {
        int(fingerprint(x)),
        int(fingerprint(x[::-1])),
    }
    assert len(seen) == 8
    signs = jnp.ones(4).at[jnp.array([0, 2])].multiply(-1)  # two top bits at once cancel in a plain weighted sum
    assert int(fingerprint(signs)) != int(fingerprint(-signs)) != int(fingerprint(jnp.ones(4)))


def test_small_whole_arrays_are_read_on_the_host_and_give_the_same(monkeypatch):
    mesh = make_mesh({"data": 8, "fsdp": 1})
    values = {"x": np.random.default_rng(0).normal(size=(8, 16)).astype(np.float32), "steps": np.int32(7)}
    flat = {path: jax.device_put(x, jax.NamedSharding(mesh, jax.P())) for path, x in values.items()}
    other = [jax.device_put(values["x"] + (k == 5), d) for k, d in enumerate(mesh.devices.flat)]
    apart = {"x": jax.make_array_from_single_device_arrays((8, 16), flat["x"].sharding, other)}
    here, differ = fingerprints(flat), copies(apart)
    assert len(differ["x"]) == 2 and copies(flat) == {path: [value] for path, value in here.items()}
    monkeypatch.setattr("src.common.files.checksums.SMALL", 0)
    assert fingerprints(flat) == here and copies(apart) == differ
