"""The loss in pieces of the vocabulary against the direct one: values, gradients, devices, and what is never made."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from src.common.sharding import make_mesh
from src.models.heads import TextHead
from src.models.vocabulary import cut_vocabulary, nats_in_pieces, nats_of_logits, rows_of

ROWS, LENGTH, WIDTH = 8, 6, 16


def case(vocab, seed=0):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    kernel = (3 * rng.normal(size=(WIDTH, vocab))).astype(np.float32)  # logits far apart: the maximum must move
    ids = rng.integers(0, vocab, (ROWS, LENGTH)).astype(np.int32)
    ids[0, :2] = 0, vocab - 1
    return hidden, kernel, ids, rng.normal(size=ids.shape).astype(np.float32)


def direct(hidden, kernel, ids):
    return optax.softmax_cross_entropy_with_integer_labels(hidden @ kernel, ids)


def pieces(hidden, kernel, ids, chunk=64, dtype=jnp.float32):
    return nats_in_pieces(hidden, kernel, ids, chunk=chunk, dtype=dtype)


def with_gradients(function):
    """(hidden, kernel, ids, weight) -> nats and the gradients of their weighted sum."""

    def run(hidden, kernel, ids, weight):
        nats, pull = jax.vjp(lambda h, w: function(h, w, ids), hidden, kernel)
        return nats, *pull(weight)

    return jax.jit(run)


def close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize("vocab, chunk", [(203, 64), (211, 64), (192, 64), (7, 3)])
def test_equal_to_the_uncutloss(vocab, chunk):
    inputs = case(vocab)
    assert cut_vocabulary(vocab, chunk, {}).count > 1
    expected = with_gradients(direct)(*inputs)
    close(with_gradients(lambda *a: pieces(*a, chunk=chunk))(*inputs), expected, 1e-5)
    close(with_gradients(lambda h, w, i: nats_of_logits(h @ w, i))(*inputs), expected, 1e-5)


def fetched(compiled):
    """The number of elements of every all-gather."""
    shapes = re.findall(r"\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    return [math.prod(map(int, shape.split(","))) for shape in shapes]


@pytest.mark.parametrize("axes, placed", [
    ({"data": 2, "tensor": 4}, P(None, "tensor")),
    ({"data": 2, "fsdp": 2, "tensor": 2}, P("fsdp", "tensor")),
    ({"fsdp": 4, "tensor": 2}, P(None, ("tensor", "fsdp"))),
])  # fmt: skip
def test_on_a_mesh_every_device_keeps_its_columns(axes, placed):
    """Equal numbers, and never more of the kernel on a device than its own columns and a piece of its neighbours'."""
    vocab, chunk = 8 * 29, 40
    inputs = case(vocab)
    mesh = make_mesh(axes)
    rows = NamedSharding(mesh, P(tuple(a for a in ("data", "fsdp") if a in axes)))
    kernel = NamedSharding(mesh, placed)
    function = jax.jit(
        with_gradients(lambda *a: pieces(*a, chunk=chunk)),
        in_shardings=(rows, kernel, rows, rows),
        out_shardings=(rows, rows, kernel),
    )
    with jax.set_mesh(mesh):
        compiled = function.lower(*inputs).compile()
        outputs = compiled(*(jax.device_put(x, s) for x, s in zip(inputs, (rows, kernel, rows, rows), strict=True)))
    close(outputs, with_gradients(direct)(*inputs), 1e-5)
    gathered = fetched(compiled)
    own = WIDTH * vocab // axes["tensor"]
    assert max(gathered, default=0) < own, f"a device fetched {max(gathered)} of {own} weights at once"


@pytest.mark.parametrize(
    "axes, placed",
    [({"data": 2, "tensor": 4}, P("tensor")), ({"data": 2, "fsdp": 2, "tensor": 2}, P("tensor", "fsdp"))],
)
def test_embedding_on_a_mesh(axes, placed):
    """Equal numbers; only `fsdp` shares of the own rows are fetched, and no device sees another's tokens."""
    _, kernel, ids, _ = case(232)
    ids[:, 2:] = 3  # the gradients of many tokens meet in one row
    weight = np.random.default_rng(1).normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    mesh = make_mesh(axes)
    rows, table = NamedSharding(mesh, P(tuple(a for a in ("data", "fsdp") if a in axes))), NamedSharding(mesh, placed)

    def run(table, ids, weight):
        vectors, pull = jax.vjp(lambda t: rows_of(t, ids, jnp.float32), table)
        return vectors, pull(weight)[0]

    function = jax.jit(run, in_shardings=(table, rows, rows), out_shardings=(rows, table))
    with jax.set_mesh(mesh):
        compiled = function.lower(kernel.T, ids, weight).compile()
        placements = zip((kernel.T, ids, weight), (table, rows, rows), strict=True)
        vectors, grads = compiled(*(jax.device_put(x, s) for x, s in placements))
    np.testing.assert_array_equal(vectors, kernel.T[ids])
    expected = np.zeros((232, WIDTH))
    np.add.at(expected, ids, weight)
    np.testing.assert_allclose(grads, expected, atol=1e-5)
    assert fetched(compiled) == ([232 // 2 * WIDTH] if "fsdp" in axes else [])


def arrays(jaxpr):
    """Shape and dtype of everything that a program makes, the bodies of its loops and calls included."""
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars)
        for value in jax.tree.leaves(list(equation.params.values())):  # closed programs are leaves
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from arrays(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_of_all_tokens_and_words_are_never_made(dtype):
    inputs = case(4099)

    def largest(function):
        return max(math.prod(a.shape) for a in arrays(jax.make_jaxpr(with_gradients(function))(*inputs).jaxpr))

    kernel, whole = WIDTH * 4099, ROWS * LENGTH * 4099
    assert largest(direct) == whole
    assert largest(lambda *a: pieces(*a, chunk=256, dtype=jnp.dtype(dtype))) == kernel < whole  # the kernel's gradient


def test_bfloat16_products():
    hidden, kernel, ids, weight = case(203)
    hidden, kernel = jnp.asarray(hidden, jnp.bfloat16), kernel.astype(jnp.bfloat16).astype(np.float32)
    ours = with_gradients(lambda *a: pieces(*a, dtype=jnp.bfloat16))(hidden, kernel, ids, weight)
    exact = with_gradients(direct)(hidden.astype(jnp.float32), kernel, ids, weight)
    assert [x.dtype for x in ours] == [jnp.float32, jnp.bfloat16, jnp.float32]
    close(ours[:1], exact[:1], 1e-5)  # the same numbers, added in f32
    close([x.astype(jnp.float32) for x in ours[1:]], exact[1:], 2**-7)


def test_the_head_cuts_large_vocabularies_only():
    hidden, kernel, ids = map(jnp.asarray, case(203)[:3])

    def loss(chunk):
        head = TextHead(WIDTH, 203, chunk=chunk, rngs=nnx.Rngs(0))
        head.linear.kernel[...] = kernel
        return jax.make_jaxpr(head.nats)(hidden, ids), head.nats(hidden, ids)

    (cut, small), (uncut, large) = loss(202), loss(203)
    assert "scan" in str(cut) and "scan" not in str(uncut)
    close([small, large], [direct(hidden, kernel, ids)] * 2, 1e-5)
    with pytest.raises(ValueError, match=r"text_head\.chunk=0 must be at least 1"):
        loss(0)
