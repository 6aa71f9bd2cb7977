"""Next-token loss over a large vocabulary, in pieces: no f32 array of tokens x vocabulary is ever made.

With z = h W and W `[D, V]`: nats = log Σ_v exp z_v - z_id, and ∂nats/∂z = softmax(z) - onehot(id). Forward and backward
walk over the columns of W, a piece at a time. The forward pass keeps a running maximum and sum of exponentials
(Milakov & Gimelshein 2018, arXiv 1805.02867) and saves log Σ exp alone; the backward pass computes each piece's logits
again (Wijmans et al. 2024, arXiv 2411.09009, without their kernels).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from src.common.mesh.constraints import automatic_axes


class Cut(NamedTuple):
    """How the V columns are cut: V = tensor · own, and `count` pieces of `size` cover the `own` columns of a device.

    Every piece has `size` columns of every device, so that all work on it and none fetches another's columns. The last
    piece ends with the last column; what the piece before it already had is masked.
    """

    tensor: int
    own: int
    count: int
    size: int
    dtype: jnp.dtype


def cut_vocabulary(vocab: int, chunk: int, tensor: int = 1, dtype: Any = jnp.float32) -> Cut:
    """The cut of V columns, split over `tensor` devices where that divides them, into as few pieces as hold at most
    `chunk` columns of each device."""
    tensor = tensor if vocab % tensor == 0 else 1
    own = vocab // tensor
    size = math.ceil(own / math.ceil(own / chunk))
    return Cut(tensor, own, math.ceil(own / size), size, jnp.dtype(dtype))


def nll_of_logits(logits: Float[Array, "B N V"], ids: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """-log softmax(logits)[ids]; compares instead of looking up, so that logits split along V stay where they are."""
    hit = jnp.arange(logits.shape[-1]) == ids[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)


def nll_in_pieces(
    hidden: Float[Array, "B N D"], kernel: Float[Array, "D V"], ids: Int[Array, "B N"], *, chunk: int, dtype
) -> Float[Array, "B N"]:
    """-log softmax(hidden · kernel)[ids] in f32, at most `chunk` columns of the kernel at a time on a device.

    Matrix products take `dtype` and add up in f32; everything else is f32. On a mesh (`jax.set_mesh`) the pieces are
    split over `tensor` as the kernel is.
    """
    cut = cut_vocabulary(kernel.shape[1], chunk, automatic_axes().get("tensor", 1), dtype)
    return _nats(hidden, kernel, ids, cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nats(hidden: Array, kernel: Array, ids: Array, cut: Cut) -> Array:
    return _forward(hidden, kernel, ids, cut)[0]


def _forward(hidden: Array, kernel: Array, ids: Array, cut: Cut) -> tuple[Array, tuple[Array, ...]]:
    shards = shards_of(kernel, cut)

    def body(carry, index):
        top, total, target = carry  # [B, N, T], each device for itself: there is no collective in the loop
        logits, hit, _ = _logits(hidden, shards, ids, index, cut)
        higher = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
        return (higher, total, target + jnp.where(hit, logits, 0).sum(-1)), None

    zeros = jnp.zeros((*ids.shape, cut.tensor), jnp.float32)
    (top, total, target), _ = jax.lax.scan(body, (zeros - jnp.inf, zeros, zeros), jnp.arange(cut.count))
    highest = top.max(-1, keepdims=True)
    log_sum = jnp.log((total * jnp.exp(top - highest)).sum(-1)) + highest[..., 0]
    return log_sum - target.sum(-1), (hidden, kernel, ids, log_sum)


def _backward(cut: Cut, saved: tuple[Array, ...], grad: Float[Array, "B N"]) -> tuple[Array, Array, None]:
    hidden, kernel, ids, log_sum = saved
    shards = shards_of(kernel, cut)

    def errors(index):
        logits, hit, weight = _logits(hidden, shards, ids, index, cut)
        error = (jnp.exp(logits - log_sum[..., None, None]) - hit) * grad[..., None, None]
        return error, weight

    return *gradients_in_pieces(errors, hidden, kernel, cut), None


_nats.defvjp(_forward, _backward)


def gradients_in_pieces(
    errors: Callable[[Array], tuple[Array, Array]], hidden: Float[Array, "B N D"], kernel: Float[Array, "D V"], cut: Cut
) -> tuple[Float[Array, "B N D"], Float[Array, "D V"]]:
    """Gradients of hidden states and kernel, in their dtypes.

    errors   number of the piece -> gradient of its logits `[B, N, T, c]` (0 where the piece before had them), and its
             columns of the kernel `[D, T, c]`
    """
    h = hidden.astype(cut.dtype)

    def body(carry, index):
        to_hidden, to_shards = carry
        error, weight = errors(index)
        error = error.astype(cut.dtype)
        to_hidden += jnp.einsum("bntc,dtc->tbnd", error, weight, preferred_element_type=jnp.float32)
        to_weight = jnp.einsum("bnd,bntc->dtc", h, error, preferred_element_type=jnp.float32)
        start = _start(index, cut)
        seen = jax.lax.dynamic_slice_in_dim(to_shards, start, cut.size, axis=2)
        # Columns that the last piece shares with the one before have no error in it.
        to_shards = jax.lax.dynamic_update_slice_in_dim(to_shards, seen + to_weight, start, axis=2)
        return (to_hidden, to_shards), None

    # One sum over `tensor` after the loop, not one in every turn.
    to_hidden = spread(jnp.zeros((cut.tensor, *hidden.shape), jnp.float32), 0)
    to_shards = spread(jnp.zeros((kernel.shape[0], cut.tensor, cut.own), jnp.float32), 1)
    (to_hidden, to_shards), _ = jax.lax.scan(body, (to_hidden, to_shards), jnp.arange(cut.count))
    return to_hidden.sum(0).astype(hidden.dtype), to_shards.reshape(kernel.shape).astype(kernel.dtype)


def shards_of(kernel: Float[Array, "D V"], cut: Cut) -> Float[Array, "D T own"]:
    """The kernel by device of `tensor`."""
    return spread(kernel.reshape(kernel.shape[0], cut.tensor, cut.own), 1)


def _start(index: Array, cut: Cut) -> Array:
    return jnp.minimum(index * cut.size, cut.own - cut.size)


def columns(index: Array, cut: Cut) -> tuple[Int[Array, "T c"], Bool[Array, " c"]]:
    """The entries of the vocabulary that a piece has of each device, and which of them no piece before it had."""
    place = _start(index, cut) + jnp.arange(cut.size)
    return place + cut.own * jnp.arange(cut.tensor)[:, None], place >= index * cut.size


def logits_of_piece(
    hidden: Float[Array, "B N D"], shards: Float[Array, "D T own"], index: Int[Array, ""], cut: Cut
) -> tuple[Float[Array, "B N T c"], Float[Array, "D T c"]]:
    """f32 logits of a piece, -inf where the piece before had them, and its columns of the kernel."""
    weight = jax.lax.dynamic_slice_in_dim(shards, _start(index, cut), cut.size, axis=2).astype(cut.dtype)
    weight = spread(weight, 1)
    logits = jnp.einsum("bnd,dtc->bntc", hidden.astype(cut.dtype), weight, preferred_element_type=jnp.float32)
    if cut.count * cut.size != cut.own:
        logits = jnp.where(columns(index, cut)[1], logits, -jnp.inf)
    return logits, weight


def _logits(hidden: Array, shards: Array, ids: Array, index: Array, cut: Cut) -> tuple[Array, Array, Array]:
    """f32 logits `[B, N, T, c]` of a piece, which of them are the targets', and its columns `[D, T, c]`."""
    logits, weight = logits_of_piece(hidden, shards, index, cut)
    place, fresh = columns(index, cut)
    hit = place == ids[..., None, None]
    return logits, hit & fresh if cut.count * cut.size != cut.own else hit, weight


def spread(x: Array, axis: int) -> Array:
    """Pins one axis of `x` to the mesh axis `tensor`, if the compiler partitions over it and it divides."""
    if x.shape[axis] % automatic_axes().get("tensor", x.shape[axis] + 1):
        return x
    free = [PartitionSpec.UNCONSTRAINED] * x.ndim
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*free[:axis], "tensor", *free[axis + 1 :]))
