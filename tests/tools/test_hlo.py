"""Programs whose collectives and products are known by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from src.tools.compile.cost import hbm_bytes, matmul_flops
from src.tools.compile.hlo import Collective, collectives, executions, parse

MESH = {"data": 2, "fsdp": 4}
P = PartitionSpec


@functools.cache
def program():
    """On 2 x 4 devices, 5 times: gather x `[8, 64]` along fsdp, times w, scatter the sum; then one of each kind."""
    mesh = jax.make_mesh((2, 4), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):
        full = jax.lax.all_gather(x, "fsdp", tiled=True)
        return jax.lax.psum_scatter(jnp.tanh(full @ w), "fsdp", tiled=True), None

    def run(x, w):
        x, _ = jax.lax.scan(lambda x, _: body(x, w), x, None, length=5)
        x = jax.lax.psum(x, "data")
        x = jax.lax.ppermute(x, "fsdp", [(i, (i + 1) % 4) for i in range(4)])
        x = jax.lax.all_to_all(x, "data", 1, 0, tiled=True)
        return jax.lax.psum(x, ("data", "fsdp"))

    mapped = jax.shard_map(run, mesh=mesh, in_specs=(P("fsdp"), P()), out_specs=P(), check_vma=False)
    return jax.jit(mapped).lower(np.zeros((32, 64), np.float32), np.zeros((64, 64), np.float32)).compile().as_text()


EXPECTED = [  # a device holds 8 x 64 float32, 2048 bytes
    Collective("all-gather", ("fsdp",), 3 * 2048, 5),
    Collective("reduce-scatter", ("fsdp",), 3 * 2048, 5),
    Collective("all-reduce", ("data",), 2048, 1),
    Collective("collective-permute", ("fsdp",), 2048, 1),
    Collective("all-to-all", ("data",), 1024, 1),
    Collective("all-reduce", ("data", "fsdp"), 2 * 2048 * 7 // 8, 1),
]


def test_every_kind_with_its_axes_bytes_and_times():
    assert collectives(program(), MESH) == EXPECTED


STYLES = [  # the groups along fsdp, along data, and along both
    ("{{0,1,2,3},{4,5,6,7}}", "{{0,4},{1,5},{2,6},{3,7}}", "{}"),
    ("[2,4]<=[8]", "[4,2]<=[2,4]T(1,0)", "[1,8]<=[8]"),
    ("mesh['x'=2,'y'=4] {'y'}", "mesh['x'=2,'y'=4] {'x'}", "mesh['x'=2,'y'=4] {'x','y'}"),
    ("mesh['x'=8] {'x':(2)4}", "mesh['x'=8] {'x':(1)2}", "mesh['x'=8] {'x'}"),
]


@pytest.mark.parametrize("style", STYLES)
def test_other_spellings_of_groups_and_trips_say_the_same(style):
    names = dict(zip((("fsdp",), ("data",), ("data", "fsdp")), style, strict=True))
    axes = iter([c.axes for c in EXPECTED if c.kind != "collective-permute"])
    spelled = r"replica_groups=(\{\{.*?\}\}|mesh\[.*?\] \{.*?\})"
    text = re.sub(spelled, lambda _: f"replica_groups={names[next(axes)]}", program())
    text = text.replace('"known_trip_count"', '"unknown"')  # the trips then follow from the condition
    assert next(axes, None) is None
    assert collectives(text, MESH) == EXPECTED


def test_products_count_with_their_loops():
    assert matmul_flops(program()) == 5 * 2 * 32 * 64 * 64

    def nested(w, x):
        inner = lambda c, _: (jnp.einsum("bij,bjk->bik", c, w), None)
        outer = lambda c, _: (jax.lax.scan(inner, c, None, length=3)[0], None)
        return jax.lax.scan(outer, x, None, length=7)[0]

    arrays = np.zeros((2, 16, 16), np.float32), np.zeros((2, 8, 16), np.float32)
    text = jax.jit(nested).lower(*arrays).compile().as_text()
    assert matmul_flops(text) == 21 * 2 * (2 * 8 * 16 * 16)


TPU = """HloModule jit_step, is_scheduled=true

%add (x: bf16[], y: bf16[]) -> bf16[] {
  %x = bf16[]{:T(256)} parameter(0)
  %y = bf16[]{:T(256)} parameter(1)
  ROOT %sum = bf16[]{:T(256)} add(%x, %y)
}

%all-reduce-scatter (input: bf16[64,32]) -> bf16[64,8] {
  %input = bf16[64,32]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %place = s32[]{:T(128)} constant(0)
  %all-reduce.5 = bf16[64,32]{1,0:T(8,128)(2,1)} all-reduce(%input), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %dynamic-slice.1 = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%all-reduce.5, %place, %place)
}

%wrapped (p: bf16[64,8]) -> bf16[64,32] {
  %p = bf16[64,8]{1,0:T(8,128)(2,1)} parameter(0)
  ROOT %all-gather.1 = bf16[64,32]{1,0} all-gather(%p), channel_id=1, replica_groups=[2,4]<=[8], dimensions={1}
}

%begin (p.1: bf16[64,8]) -> (bf16[64,8], bf16[64,32]) {
  %p.1 = bf16[64,8]{1,0} parameter(0)
  %all-gather.2 = bf16[64,32]{1,0} all-gather(%p.1), channel_id=7, replica_groups=[2,4]<=[8], x={chain_id="0"}
  ROOT %custom-call.1 = (bf16[64,8]{1,0}, bf16[64,32]{1,0}) custom-call(%all-gather.2)
}

%meanwhile (p.2: bf16[64,8], w: bf16[9,64,8], l: s32[]) -> (bf16[64,8], bf16[64,8]) {
  %p.2 = bf16[64,8]{1,0} parameter(0)
  %w = bf16[9,64,8]{2,1,0} parameter(1)
  %l = s32[] parameter(2)
  %zero = s32[] constant(0)
  %all-gather.3 = bf16[64,32]{1,0} all-gather(%p.2), channel_id=7, replica_groups=[2,4]<=[8], x={chain_id="0"}
  %layer = bf16[1,64,8]{2,1,0} dynamic-slice(%w, %l, %zero, %zero)
  %flat = bf16[64,8]{1,0} bitcast(%layer)
  ROOT %both = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) tuple(%p.2, %flat)
}

ENTRY %main (a: bf16[64,32], weights: bf16[9,64,8], place: s32[]) -> bf16[64,32] {
  %a = bf16[64,32]{1,0:T(8,128)(2,1)} parameter(0)
  %weights = bf16[9,64,8]{2,1,0} parameter(1)
  %at = s32[]{:T(128)S(6)} parameter(2)
  %scattered = bf16[64,8]{1,0:T(8,128)(2,1)S(1)} fusion(%a), kind=kCustom, calls=%all-reduce-scatter
  %start = ((bf16[64,8]{1,0}), bf16[64,32]{1,0}, u32[]{:S(2)}) async-start(%scattered), calls=%wrapped
  %update = ((bf16[64,8]{1,0}), bf16[64,32]{1,0}, u32[]{:S(2)}) async-update(%start), calls=%wrapped
  %done = bf16[64,32]{1,0} async-done(%update), calls=%wrapped
  %first = (bf16[64,8]{1,0}, bf16[64,32]{1,0}) fusion(%scattered), kind=kLoop, calls=%begin
  %kept = bf16[64,8]{1,0} get-tuple-element(%first), index=0
  %second = (bf16[64,8]{1,0}, bf16[64,8]{1,0}) fusion(%kept, %weights, %at), kind=kLoop, calls=%meanwhile
  %b = bf16[4,16,8]{2,1,0} bitcast(%done)
  %out = bf16[4,16,16]{2,1,0} convolution(%b, %b), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0oi->0bf
  ROOT %sent = bf16[64,32]{1,0} all-reduce-done(%done)
}
"""


def test_what_the_tpu_compiler_writes():
    assert collectives(TPU, MESH) == [
        Collective("reduce-scatter", ("fsdp",), 3072, 1),
        Collective("all-gather", ("fsdp",), 3072, 1),
        Collective("all-gather", ("fsdp",), 3072, 1),  # a chain over two fusions
    ]
    assert executions(parse(TPU))["wrapped"] == 1
    assert matmul_flops(TPU) == 2 * 4 * 16 * 16 * 8  # four products [16, 8] x [8, 16]


def test_memory_traffic_of_what_the_tpu_compiler_writes():
    small, large, out = 64 * 8 * 2, 64 * 32 * 2, 4 * 16 * 16 * 2
    parts = [
        large,  # the scatter reads %a; its result stays in fast memory
        small + large,  # the asynchronous gather, inside its own computation
        small + large,  # the chained gather, once
        2 * small,  # the fusion meanwhile reads one layer of nine and writes it; what it hands on is free
        2 * (4 * 16 * 8 * 2) + out,  # the product reads %b twice
    ]
    assert hbm_bytes(TPU) == sum(parts)


def test_one_of_several_branches_counts():
    """A loop of five rows, each with one of four products of 8 x 16 x n."""
    branches = [lambda x, n=n: (x @ jnp.ones((16, n))).sum() for n in (1, 2, 3, 10)]
    choose = lambda which, x: jax.lax.map(lambda row: jax.lax.switch(row[0], branches, row[1]), (which, x))
    text = jax.jit(choose).lower(jnp.zeros(5, int), jnp.ones((5, 8, 16))).compile().as_text()
    assert matmul_flops(text) == 5 * 2 * 8 * 16 * (1 + 2 + 3 + 10) / 4
