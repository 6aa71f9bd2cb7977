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

from src.common.mesh.fsdp import Placement
from src.common.mesh.sharding import make_mesh
from src.interfaces import FieldSpec
from src.models.embedders.tokens import look_up
from src.models.heads.categorical import CategoricalHead
from src.models.heads.chunked_cross_entropy import cut_vocabulary, nll_in_pieces, nll_of_logits

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
    return nll_in_pieces(hidden, kernel, ids, chunk=chunk, dtype=dtype)


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
def test_equal_to_the_direct_loss(vocab, chunk):
    inputs = case(vocab)
    assert cut_vocabulary(vocab, chunk).count > 1
    expected = with_gradients(direct)(*inputs)
    close(with_gradients(lambda *a: pieces(*a, chunk=chunk))(*inputs), expected, 1e-5)
    close(with_gradients(lambda h, w, i: nll_of_logits(h @ w, i))(*inputs), expected, 1e-5)


@pytest.mark.parametrize("axes", [{"data": 2, "tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}], ids=str)
def test_on_a_mesh_every_device_keeps_its_columns(axes):
    """As in the train step: rows by hand over data and fsdp, V over tensor by the compiler. Equal numbers, and nothing
    is fetched but the halves of the own columns and rows that lie on the other device of `fsdp`."""
    vocab = 8 * 29
    hidden, kernel, ids, weight = case(vocab)
    ids[:, 2:] = 3  # the gradients of many tokens meet in one row of the table
    mesh, params = make_mesh(axes), {"kernel": kernel, "table": kernel.T}
    fsdp = "fsdp" if "fsdp" in axes else None
    placement = Placement({"kernel": P(fsdp, "tensor"), "table": P("tensor", fsdp)}, jnp.float32)
    where = {name: NamedSharding(mesh, spec) for name, spec in placement.specs.items()}
    rows = NamedSharding(mesh, P(tuple(a for a in ("data", "fsdp") if a in axes)))

    def local(params, part, add):
        hidden, ids, weight = part

        def loss(params):
            whole = placement.fetch(params)
            nats = pieces(hidden + look_up(whole["table"], ids, jnp.float32), whole["kernel"], ids, chunk=40)
            return (nats * weight).sum()

        total, grads = jax.value_and_grad(loss)(params)
        return grads, add(total)

    def run(params, part):
        return placement.local(local, params, part)

    with jax.set_mesh(mesh):
        function = jax.jit(run, in_shardings=(where, rows), out_shardings=(where, None))
        compiled = function.lower(params, (hidden, ids, weight)).compile()
        grads, total = compiled(jax.device_put(params, where), jax.device_put((hidden, ids, weight), rows))

    def plain(params):
        return (direct(hidden + params["table"][ids], params["kernel"], ids) * weight).sum()

    expected, grads_expected = jax.value_and_grad(plain)(jax.tree.map(jnp.asarray, params))
    close((total, *jax.tree.leaves(grads)), (expected, *jax.tree.leaves(grads_expected)), 1e-5)
    shapes = re.findall(r"\[([\d,]+)\]\S* all-gather\(", compiled.as_text())
    fetched = [math.prod(map(int, shape.split(","))) for shape in shapes]
    assert fetched == ([WIDTH * vocab // 2] * 2 if fsdp else [])


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
        head = CategoricalHead(width=WIDTH, spec=FieldSpec((), 203), outputs=203, chunk=chunk, rngs=nnx.Rngs(0))
        head.linear.kernel[...] = kernel
        return jax.make_jaxpr(head.nll)(hidden, ids), head.nll(hidden, ids)

    (cut, small), (uncut, large) = loss(202), loss(203)
    assert "scan" in str(cut) and "scan" not in str(uncut)
    close([small, large], [direct(hidden, kernel, ids)] * 2, 1e-5)
    with pytest.raises(ValueError, match=r"head\.chunk=0"):
        loss(0)
