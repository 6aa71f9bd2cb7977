"""Every attention backend computes what the dense one does; kernels are interpreted, or another stands in for them."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from src.common.mesh.constraints import platform
from src.interfaces import Batch, Packing, Tokens
from src.models.attention import Sizes, prepare_attention
from src.models.backends import splash
from src.models.conditioning import Condition
from src.models.embed import Embedded, join_rows, pad_rows
from src.models.transformer import Transformer
from src.sequence.layout import FixedLayout
from src.sequence.mask import visible
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment

MIXED = FixedLayout(
    (
        Segment("prompt", 40),
        Segment("image", 69, "bidirectional", lead=1),
        Segment("caption", 50),
        Segment("blocks", 9, "block:4"),
        Segment("scales", 8, (1, 3, 4), markov=True),
        Segment("copied", 7, "block:3", role="copies"),  # and its noisy copy at the row's end
    )
)


def spec_of(layout, rows):
    """The spec of rows without padding."""
    full = lambda length: jnp.ones((rows, length), bool)
    tokens = {s.name: Tokens(full(s.length), full(s.length), full(s.length)) for s in layout.segments}
    return layout.spec(Batch(tokens))


def rows_of_all_kinds(by_row):
    """Four rows of the mixed layout: padding inside, packed, padded at the end, full; with a relation when by row."""
    segment = np.ones((4, MIXED.length), np.int32)
    segment[0, 20:40], segment[0, 150:160] = 0, 0
    segment[1, 75:150], segment[1, 150:] = 2, 3
    segment[2, -45:] = 0
    spec = spec_of(MIXED, 4).replace(segment=jnp.asarray(segment))
    if by_row:
        relation = jax.random.bernoulli(jax.random.key(3), 0.8, (4, 191, 191)) | np.eye(191, dtype=bool)
        orders = {k: jnp.broadcast_to(getattr(spec, k), segment.shape) for k in ("read", "write", "group")}
        orders["group"] = orders["group"].at[3].set(0)  # one row is another layout
        spec = spec.replace(relation=relation, **orders)
    return spec


def out_and_gradients(name, spec, sizes, q, k, v, weight):
    """Output on the tokens that are no padding, and gradients of q, k and v."""

    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2), has_aux=True)
    def loss(q, k, v, segment):
        rows = spec.replace(segment=segment)
        out = prepare_attention(name, rows, rows, sizes)(q, k, v)
        return (out * weight).sum(), out

    (_, out), gradients = jax.jit(loss)(q, k, v, spec.segment)
    assert jnp.isfinite(out).all()  # padding too
    return jnp.where((spec.segment > 0)[..., None, None], out, 0), *gradients


@functools.cache
def dense(by_row):
    """The rows of all kinds, what a backend is given of them, and what the dense one makes of it."""
    spec = rows_of_all_kinds(by_row)
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (4, 191, n, 64)) for key, n in zip(keys, (4, 2, 2, 4), strict=True))
    weight = weight * (spec.segment > 0)[..., None, None]
    sizes = Sizes(4, 191, 191, 4, 2, 64, jnp.float32, "cpu")
    return spec, sizes, (q, k, v, weight), out_and_gradients("dense", spec, sizes, q, k, v, weight)


CASES = {
    "splash_static": ("splash", False, {}),
    "splash_by_row": ("splash", True, {}),
    "splash_static_mesh": ("splash", False, {"data": 2, "context": 4}),
    "splash_by_row_mesh": ("splash", True, {"data": 2, "tensor": 2, "context": 2}),
    "cudnn_static": ("cudnn", False, {}),
    "cudnn_by_row_mesh": ("cudnn", True, {"data": 2, "tensor": 2, "context": 2}),
}


LONG = ("splash_static_mesh", "splash_by_row_mesh")  # of the group `faults`
MARKED = [pytest.param(*CASES[name], marks=pytest.mark.faults if name in LONG else ()) for name in CASES]


@pytest.mark.parametrize(("name", "by_row", "axes"), MARKED, ids=CASES)
def test_backends_equal_dense(name, by_row, axes, monkeypatch):
    """Every mask mode in one row, grouped heads, padding, packing, an odd length; forward and backward."""
    spec, sizes, arrays, expected = dense(by_row)
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)) if axes else None
    if name == "cudnn":  # everything but the kernel
        real = jax.nn.dot_product_attention
        stand_in = lambda *a, implementation, mask: real(*a, mask=mask)
        monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
        sizes = sizes._replace(platform="gpu", dtype=jnp.bfloat16)
    if by_row:
        monkeypatch.setattr(splash, "BLOCKS", (128,))  # several, in both directions
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        found = out_and_gradients(name, spec, sizes, *arrays)
    for what, a, b in zip(("out", "dq", "dk", "dv"), expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=what)


@pytest.mark.faults
@pytest.mark.parametrize("rows", ["static", "packed"])
def test_a_kernel_has_the_window_of_the_queries(rows):
    """Where blocks are found before any data, and where they are found on the device."""
    if rows == "static":
        spec, sizes, arrays, _ = dense(False)
    else:
        spec, sizes, arrays, _ = dense_of_packed_rows()
    spec = spec.replace(window=33)
    expected, found = (out_and_gradients(name, spec, sizes, *arrays) for name in ("dense", "splash"))
    for what, a, b in zip(("out", "dq", "dk", "dv"), expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=what)
    unlimited = prepare_attention("dense", spec.replace(window=0), spec, sizes)(*arrays[:3])
    assert jnp.abs(jnp.where((spec.segment > 0)[..., None, None], unlimited, 0) - expected[0]).max() > 0.01


def packed_rows():
    """Three rows of 300 slots: images over the end of a block and at the row's end, one example, and padding alone."""
    layout = PackedLayout((Segment("text", 300), Segment("image", 30, "bidirectional", lead=1)), 300, (("image", 3),))
    begins, example = np.full((3, 3), -1, np.int32), np.zeros((3, 300), np.int32)
    begins[0], begins[1, 0] = (20, 115, 270), 250
    example[0, :100], example[0, 100:170], example[0, 180:] = 1, 2, 3
    example[1, :290] = 1
    there = jnp.asarray(example > 0)
    image = jnp.asarray(np.repeat(begins[..., None] >= 0, 30, axis=2))
    tokens = {"text": Tokens(there, there, there), "image": Tokens(image, image, image)}
    return layout.spec(Batch(tokens, packing=Packing(jnp.asarray(example), {"image": jnp.asarray(begins)})))


@functools.cache
def dense_of_packed_rows():
    """The packed rows, what a backend is given of them, and what the dense one makes of it."""
    spec = packed_rows()
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weight = (jax.random.normal(key, (3, 300, n, 16)) for key, n in zip(keys, (2, 1, 1, 2), strict=True))
    weight = weight * (spec.segment > 0)[..., None, None]
    sizes = Sizes(3, 300, 300, 2, 1, 16, jnp.float32, "cpu")
    return spec, sizes, (q, k, v, weight), out_and_gradients("dense", spec, sizes, q, k, v, weight)


@pytest.mark.parametrize(
    ("block", "axes"),
    [
        pytest.param(128, {}, marks=pytest.mark.faults),
        pytest.param(384, {}, marks=pytest.mark.faults),
        (128, {"data": 1, "context": 3}),
    ],
    ids=("blocks", "one_block", "mesh"),
)
def test_packed_rows_need_no_mask_and_visit_what_they_see(block, axes, monkeypatch):
    """Rows of several blocks, joined, and of one; forward and backward, without an array of the mask."""
    monkeypatch.setattr(splash, "BLOCKS", (block, 128))
    spec, sizes, arrays, expected = dense_of_packed_rows()
    mesh = jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes)) if axes else None
    with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
        attend = prepare_attention("splash", spec, spec, sizes)
        found = out_and_gradients("splash", spec, sizes, *arrays)
    for what, a, b in zip(("out", "dq", "dk", "dv"), expected, found, strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5, rtol=0, err_msg=what)
    assert max(a.size for a in attend.mask.arrays) == 3 * 384
    if block == 128:
        seen = np.pad(visible(spec, spec), ((0, 0), (0, 84), (0, 84))).reshape(3, 3, 128, 3, 128).any((2, 4))
        seen[2] = np.eye(3)  # padding alone
        np.testing.assert_array_equal(attend.mask.arrays[0] > 0, seen)
        assert seen[0].sum() == 6 and seen[1].sum() == 7  # of 9; an image sees over the end of its block


@pytest.mark.parametrize("other", ["packed", "fixed"])
def test_rows_of_two_tasks_are_contiguous_if_both_are(other):
    specs = packed_rows(), packed_rows() if other == "packed" else spec_of(FixedLayout((Segment("a", 300),)), 3)
    condition = Condition(jnp.zeros((3, 1, 4)), np.full(300, -1, np.int32))
    whole = join_rows([Embedded(jnp.zeros((3, 300, 4)), spec, condition, {}) for spec in specs])
    assert whole.spec.contiguous == (other == "packed") and whole.spec.read.shape == (6, 300)
    assert pad_rows(whole, 4).spec.contiguous == whole.spec.contiguous


def test_packed_rows_visit_every_block_that_is_seen():
    """Of random packings, in whatever order their examples have numbers."""
    rng, slots = np.random.default_rng(0), np.arange(64)
    rows = packed_rows().replace(read=slots, write=slots)

    @jax.jit
    def seen_of(segment, group):
        spec = rows.replace(segment=segment, group=group)
        last = splash._last_seen(spec)
        return last, visible(spec, spec), splash._some_seen(segment, segment, last, 8)

    for _ in range(20):
        segment, group = np.zeros((2, 2, 64), np.int32)
        for row in range(2):
            cuts, number = np.sort(rng.choice(np.arange(1, 64), 5, replace=False)), rng.permutation(6)
            segment[row] = np.repeat(number, np.diff([0, *cuts, 64]))
            group[row, cuts[0] : cuts[1]], group[row, cuts[2] + 1 : cuts[3]] = 1, 2
        last, seen, table = (np.asarray(a) for a in seen_of(segment, group))
        same = (segment[:, :, None] == segment[:, None]) & (segment > 0)[:, None]
        np.testing.assert_array_equal(seen, same & (slots <= last[..., None]))
        assert not (seen.reshape(2, 8, 8, 8, 8).any((2, 4)) & ~(table > 0)).any()


def test_dense_equals_the_library():
    """Grouped and not; a query that sees nothing gets the mean of v."""
    spec = rows_of_all_kinds(True)
    for kv_heads in (2, 4):
        keys = jax.random.split(jax.random.key(kv_heads), 3)
        q, k, v = (jax.random.normal(key, (4, 191, n, 8)) for key, n in zip(keys, (4, kv_heads, kv_heads), strict=True))
        dense = prepare_attention("dense", spec, spec, Sizes(4, 191, 191, 4, kv_heads, 8, jnp.float32, "cpu"))
        assert not dense.mask[0, 0, 25].any()
        found = jax.jit(dense)(q, k, v)
        expected = jax.jit(functools.partial(jax.nn.dot_product_attention, mask=dense.mask))(q, k, v)
        np.testing.assert_allclose(found, expected, atol=1e-6)
        np.testing.assert_allclose(found[0, 25], np.repeat(v[0].mean(axis=0), 4 // kv_heads, axis=0), atol=1e-6)


@pytest.mark.faults
def test_trunk_with_splash():
    """In the scan over layers, recomputed, orders as arrays: hidden states and all gradients are those of dense."""
    layout = FixedLayout((Segment("prompt", 60), Segment("image", 68, "bidirectional")))
    valid = np.ones((2, 128), bool)
    valid[0, 50:60] = False
    x = jax.random.normal(jax.random.key(1), (2, 128, 32))

    @functools.partial(jax.jit, static_argnums=0)
    def run(name):
        graph, params = nnx.split(Transformer(32, 2, 2, 1, 32, attention=name, remat="full", rngs=nnx.Rngs(0)))

        def loss(params):
            none = Condition(jnp.zeros((2, 1, 32)), np.full(128, -1, np.int32))
            spec = spec_of(layout, 2).replace(segment=jnp.asarray(valid, jnp.int32))
            spec = spec.replace(read=jnp.asarray(spec.read))  # no longer static, as when tasks share a pass
            hidden, _, _ = nnx.merge(graph, params)(x, spec, none)
            return (jnp.where(valid[..., None], hidden, 0) * x).sum()

        return jax.value_and_grad(loss)(params)

    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), run("splash"), run("dense"))


@pytest.mark.parametrize(
    ("name", "changes", "cached", "chosen"),
    [
        ("auto", {"platform": "tpu"}, False, "Splash"),
        ("auto", {"platform": "tpu"}, True, "Dense"),  # a cache
        ("auto", {"platform": "tpu", "queries": 26, "keys": 26}, False, "Dense"),  # short
        ("auto", {"platform": "tpu", "dtype": jnp.float16}, False, "Dense"),
        ("auto", {"platform": "gpu"}, False, "Cudnn"),
        ("auto", {"platform": "cuda"}, False, "Cudnn"),
        ("auto", {"platform": "gpu", "dtype": jnp.float32}, False, "Dense"),
        ("auto", {"platform": "gpu", "head_dim": 72 + 4}, False, "Dense"),
        ("auto", {}, False, "Dense"),
        ("splash", {}, False, "Splash"),
        ("cudnn", {}, True, "Dense"),  # decoding is dense whatever the name
    ],
)
def test_choice(name, changes, cached, chosen):
    sizes = Sizes(2, 130, 130, 2, 1, 64, jnp.bfloat16, "cpu")._replace(**changes)
    spec = spec_of(FixedLayout((Segment("a", sizes.keys),)), 2)
    attend = prepare_attention(name, spec, spec, sizes, cached)
    assert type(attend).__name__ == chosen
    if chosen == "Splash":
        assert isinstance(attend.mask, splash._Static)


@pytest.mark.parametrize(
    ("name", "platform", "message"),
    [
        ("cudnn", "cpu", "model.trunk.attention='cudnn' runs on NVIDIA GPUs, not on cpu; use auto or dense"),
        ("splash", "gpu", "model.trunk.attention='splash' runs on TPU, not on gpu; use auto or dense"),
        ("flash", "cpu", "no src/models/backends/flash.py.*cudnn, dense, splash"),
    ],
)
def test_refusals(name, platform, message):
    spec = spec_of(MIXED, 1)
    with pytest.raises(ValueError, match=message):
        prepare_attention(name, spec, spec, Sizes(1, 191, 191, 2, 2, 64, jnp.bfloat16, platform))
    if name == "flash":
        with pytest.raises(ValueError, match=message):
            Transformer(32, 1, 2, attention=name, rngs=nnx.Rngs(0))


def test_platform_is_the_mesh_s():
    """Not that of the machine that compiles."""
    assert platform() == "cpu"
    absent = AbstractMesh((8,), ("data",), abstract_device=AbstractDevice("TPU v5 lite", 1, "tpu"))
    with jax.sharding.use_abstract_mesh(absent):
        assert platform() == "tpu"


@pytest.mark.parametrize(
    ("length", "parts", "expected"),
    [
        (291, 1, (384, 384)),
        (512, 1, (512, 512)),
        (640, 1, (768, 384)),
        (130, 1, (256, 256)),
        (1408, 1, (1536, 512)),
        (512, 2, (512, 256)),
        (191, 4, (512, 128)),
        (2048, 4, (2048, 512)),
    ],
)
def test_blocks(length, parts, expected):
    """Large blocks, whole for every part, and little padding."""
    assert splash._padded(length, parts) == expected
