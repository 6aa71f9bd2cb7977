"""KL divergence of a student's distribution of the next token from a teacher's, in pieces of the vocabulary.

With logits z of the student and y of the teacher, temperature τ, a = y / τ, b = z / τ, p = softmax(a), q = softmax(b):

    KL(p || q) = Σ_v p_v (a_v - b_v) - log Σ_v exp a_v + log Σ_v exp b_v

and the loss is τ² KL, so that its gradient has the scale of the cross-entropy's at any τ (Hinton et al. 2015, arXiv
1503.02531, section 2): ∂/∂z = τ (q - p). The teacher has no gradient.

As in `chunked_cross_entropy.py` no f32 array of tokens x vocabulary is made: the forward pass keeps, over the pieces,
the maxima of a and b, Σ exp a, Σ exp b and Σ exp(a) (a - b), each relative to its maximum; the backward pass computes
the logits of both again. Where student and teacher are equal, value and gradient are exactly 0: all that is subtracted
is equal bit by bit.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from src.common.mesh.constraints import automatic_axes
from src.models.heads.chunked_cross_entropy import (
    Cut,
    columns,
    cut_vocabulary,
    gradients_in_pieces,
    logits_of_piece,
    shards_of,
)


class Side(NamedTuple):
    """Hidden states `[B, N, D]` and the kernel `[D, V]` that makes them logits."""

    hidden: Float[Array, "B N D"]
    kernel: Float[Array, "D V"]


def divergence_in_pieces(student: Side, teacher: Side, *, temperature: float, chunk: int, dtype) -> Float[Array, "B N"]:
    """τ² KL(teacher || student) of every token in nats, f32.

    At most `chunk` columns of the kernels at a time on a device; matrix products take `dtype` and add up in f32, and
    everything else is f32. On a mesh the pieces are split over `tensor` as the kernels are.
    """
    cut = cut_vocabulary(student.kernel.shape[1], chunk, automatic_axes().get("tensor", 1), dtype)
    return _divergence(student, teacher, temperature, cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _divergence(student: Side, teacher: Side, temperature: float, cut: Cut) -> Array:
    return _forward(student, teacher, temperature, cut)[0]


def _forward(student: Side, teacher: Side, temperature: float, cut: Cut) -> tuple[Array, tuple]:
    ours, theirs = shards_of(student.kernel, cut), shards_of(teacher.kernel, cut)

    def body(carry, index):
        (top_a, sum_a), (top_b, sum_b), apart = carry  # [B, N, T], each device for itself
        a = logits_of_piece(teacher.hidden, theirs, index, cut)[0] / temperature
        b = logits_of_piece(student.hidden, ours, index, cut)[0] / temperature
        higher, grown = _grow(top_a, sum_a, a)
        gap = jnp.where(columns(index, cut)[1], a - b, 0)  # both are -inf where the piece before had them
        apart = apart * jnp.exp(top_a - higher) + (jnp.exp(a - higher[..., None]) * gap).sum(-1)
        return ((higher, grown), _grow(top_b, sum_b, b), apart), None

    zeros = jnp.zeros((*student.hidden.shape[:2], cut.tensor), jnp.float32)
    start = ((zeros - jnp.inf, zeros), (zeros - jnp.inf, zeros), zeros)
    ((top_a, sum_a), (top_b, sum_b), apart), _ = jax.lax.scan(body, start, jnp.arange(cut.count))
    highest, total, log_a = _close(top_a, sum_a)
    log_b = _close(top_b, sum_b)[2]
    mean = (apart * jnp.exp(top_a - highest)).sum(-1) / total
    return temperature**2 * (mean - log_a + log_b), (student, teacher, log_a, log_b)


def _backward(temperature: float, cut: Cut, saved: tuple, grad: Float[Array, "B N"]) -> tuple[Side, None]:
    student, teacher, log_a, log_b = saved
    ours, theirs = shards_of(student.kernel, cut), shards_of(teacher.kernel, cut)

    def errors(index):
        a = logits_of_piece(teacher.hidden, theirs, index, cut)[0] / temperature
        b, weight = logits_of_piece(student.hidden, ours, index, cut)
        p, q = jnp.exp(a - log_a[..., None, None]), jnp.exp(b / temperature - log_b[..., None, None])
        return temperature * (q - p) * grad[..., None, None], weight

    return Side(*gradients_in_pieces(errors, student.hidden, student.kernel, cut)), None  # none for the teacher


_divergence.defvjp(_forward, _backward)


def _grow(top: Array, total: Array, logits: Float[Array, "B N T c"]) -> tuple[Array, Array]:
    """The running maximum, and the sum of exponentials relative to it, with one more piece."""
    higher = jnp.maximum(top, logits.max(-1))
    return higher, total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)


def _close(top: Float[Array, "B N T"], total: Float[Array, "B N T"]) -> tuple[Array, Array, Array]:
    """Over all devices: the maximum `[B, N, 1]`, the sum of exponentials relative to it, and log Σ exp, `[B, N]`."""
    highest = top.max(-1, keepdims=True)
    total = (total * jnp.exp(top - highest)).sum(-1)
    return highest, total, jnp.log(total) + highest[..., 0]
