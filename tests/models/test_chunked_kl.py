"""The divergence in pieces of the vocabulary against the direct one: values, gradients, devices, exact zeros."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from src.common.mesh.sharding import make_mesh
from src.models.heads.chunked_kl import Side, divergence_in_pieces
from tests.models.test_chunked_cross_entropy import LENGTH, ROWS, WIDTH, arrays, case, close


def sides(vocab):
    """(student, teacher, weight of each token); logits far apart, so that the maxima move."""
    (hidden, kernel, _, weight), (other, theirs, _, _) = case(vocab), case(vocab, seed=1)
    teacher = Side(hidden + 0.3 * other, 0.7 * kernel + 0.3 * theirs)
    return jax.tree.map(jnp.asarray, (Side(hidden, kernel), teacher, weight))


def direct(student, teacher, temperature):
    a, b = (jax.nn.log_softmax(side.hidden @ side.kernel / temperature) for side in (teacher, student))
    return temperature**2 * (jnp.exp(a) * (a - b)).sum(-1)


def pieces(student, teacher, temperature, chunk=64):
    return divergence_in_pieces(student, teacher, temperature=temperature, chunk=chunk, dtype=jnp.float32)


def with_gradients(function, temperature):
    """(student, teacher, weight) -> values, and the gradients of their weighted sum for hidden states and kernel."""

    def run(student, teacher, weight):
        values, pull = jax.vjp(lambda s: function(s, teacher, temperature), student)
        return values, *pull(weight)[0]

    return jax.jit(run)


@pytest.mark.parametrize("vocab, temperature", [(203, 2.5), pytest.param(50, 0.5, marks=pytest.mark.faults)])
def test_equal_to_the_direct_divergence(vocab, temperature):
    inputs = sides(vocab)
    expected = with_gradients(direct, temperature)(*inputs)
    close(with_gradients(pieces, temperature)(*inputs), expected, 1e-5)
    assert (np.asarray(expected[0]) > 0).all() and expected[0].max() > 1
    to_teacher = jax.jit(jax.grad(lambda t: pieces(inputs[0], t, temperature).sum()))(inputs[1])
    assert not any(np.any(g) for g in to_teacher)


@pytest.mark.parametrize("vocab", [203, pytest.param(50, marks=pytest.mark.faults)])
def test_a_student_that_is_its_teacher_has_no_divergence_and_no_gradient(vocab):
    student, _, weight = sides(vocab)
    for value in with_gradients(pieces, 1.7)(student, Side(*(a.copy() for a in student)), weight):
        np.testing.assert_array_equal(value, 0)


@pytest.mark.faults
def test_on_a_mesh_and_without_an_array_of_all_tokens_and_words():
    student, teacher, weight = sides(8 * 521)
    mesh = make_mesh({"data": 2, "tensor": 4})
    place = lambda *spec: NamedSharding(mesh, P(*spec))
    where = Side(place("data"), place(None, "tensor"))
    run = with_gradients(lambda *a: pieces(*a, chunk=256), 2.0)
    with jax.set_mesh(mesh):
        found = jax.jit(run, in_shardings=(where, where, place("data")))(student, teacher, weight)
    close(found, with_gradients(direct, 2.0)(student, teacher, weight), 1e-5)
    made = max(math.prod(a.shape) for a in arrays(jax.make_jaxpr(run)(student, teacher, weight).jaxpr))
    assert made == WIDTH * 8 * 521 < ROWS * LENGTH * 8 * 521  # the kernel's gradient
