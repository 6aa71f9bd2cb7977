"""The two places that meet a whole vocabulary, whose V entries may be split over the mesh axis `tensor`.

Embedding: every device looks up the ids that it has, and the results are added.

Next-token loss, in pieces of the vocabulary: no f32 array of tokens x vocabulary is ever made.
With z = h W and W `[D, V]`: nats = log Σ_v exp z_v - z_id, and ∂nats/∂z = softmax(z) - onehot(id). Forward and backward
walk over the columns of W, a piece at a time. The forward pass keeps a running maximum and sum of exponentials
(Milakov & Gimelshein 2018, arXiv 1805.02867) and saves log Σ exp alone; the backward pass computes each piece's logits
again (Wijmans et al. 2024, arXiv 2411.09009, without their kernels).
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

FREE = PartitionSpec.UNCONSTRAINED


class Cut(NamedTuple):
    """How the V columns are walked: V = tensor · fsdp · own, and `count` pieces of `size` cover the `own` columns.

    Every piece has `size` columns of every shard, so that all devices work on it and none fetches another's columns
    along `tensor`. The last piece ends with the last column; what the piece before it already had is masked.
    """

    tensor: int
    fsdp: int
    own: int
    count: int
    size: int
    dtype: jnp.dtype


def cut_vocabulary(vocab: int, chunk: int, axes: dict[str, int], dtype=jnp.float32) -> Cut:
    """The cut of V columns into as few pieces as give a device at most `chunk` of them at a time (at least one of each
    shard), on a mesh with these axis sizes. An axis that does not divide the columns is left out.
    """
    tensor = axes.get("tensor", 1) if vocab % axes.get("tensor", 1) == 0 else 1
    fsdp = axes.get("fsdp", 1) if vocab // tensor % axes.get("fsdp", 1) == 0 else 1
    own = vocab // (tensor * fsdp)
    size = math.ceil(own / math.ceil(own / max(chunk // fsdp, 1)))
    return Cut(tensor, fsdp, own, math.ceil(own / size), size, jnp.dtype(dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def rows_of(table: Float[Array, "V D"], ids: Int[Array, "*N"], dtype: Any = jnp.float32) -> Float[Array, "*N D"]:
    """table[ids] in `dtype`. A table split over `fsdp` is fetched in `dtype`, one split over V and `tensor` is not.

    The gradients of an id's many occurrences are added in f32.
    """
    return jnp.take(_spread(table.astype(dtype), "tensor", None), ids, axis=0)


def _rows_forward(table: Array, ids: Array, dtype: Any) -> tuple[Array, tuple[Array, Array]]:
    return rows_of(table, ids, dtype), (table, ids)


def _rows_backward(dtype: Any, saved: tuple[Array, Array], grad: Array) -> tuple[Array, None]:
    table, ids = saved
    zeros = _spread(jnp.zeros(table.shape, jnp.float32), "tensor", None)
    return _spread(zeros.at[ids].add(grad.astype(jnp.float32)), "tensor", None).astype(table.dtype), None


rows_of.defvjp(_rows_forward, _rows_backward)


def nats_of_logits(logits: Float[Array, "B N V"], ids: Int[Array, "B N"]) -> Float[Array, "B N"]:
    """-log softmax(logits)[ids]; compares instead of looking up, so that logits split along V stay where they are."""
    hit = jnp.arange(logits.shape[-1]) == ids[..., None]
    return jax.nn.logsumexp(logits, axis=-1) - jnp.where(hit, logits, 0).sum(-1)


def nats_in_pieces(
    hidden: Float[Array, "B N D"], kernel: Float[Array, "D V"], ids: Int[Array, "B N"], *, chunk: int, dtype
) -> Float[Array, "B N"]:
    """-log softmax(hidden · kernel)[ids] in f32, at most `chunk` columns of the kernel at a time on a device.

    Matrix products take `dtype` and add up in f32; everything else is f32. Reads the mesh axes `tensor` and `fsdp`
    of the context (`jax.set_mesh`); a kernel split over V is expected in the order (tensor, fsdp).
    """
    cut = cut_vocabulary(kernel.shape[1], chunk, dict(jax.sharding.get_abstract_mesh().shape), dtype)
    return _nats(hidden, kernel, ids, cut)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _nats(hidden: Array, kernel: Array, ids: Array, cut: Cut) -> Array:
    return _forward(hidden, kernel, ids, cut)[0]


def _forward(hidden: Array, kernel: Array, ids: Array, cut: Cut) -> tuple[Array, tuple[Array, ...]]:
    shards = _shards(kernel, cut)

    def body(carry, index):
        top, total, target = carry  # [B, N, T, F], each shard for itself: the loop has no collective but the fetch
        logits, hit, _ = _logits(hidden, shards, ids, index, cut)
        higher = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - higher) + jnp.exp(logits - higher[..., None]).sum(-1)
        return (higher, total, target + jnp.where(hit, logits, 0).sum(-1)), None

    zeros = jnp.zeros((*ids.shape, cut.tensor, cut.fsdp), jnp.float32)
    (top, total, target), _ = jax.lax.scan(body, (zeros - jnp.inf, zeros, zeros), jnp.arange(cut.count))
    highest = top.max((-2, -1), keepdims=True)
    log_sum = jnp.log((total * jnp.exp(top - highest)).sum((-2, -1))) + highest[..., 0, 0]
    return log_sum - target.sum((-2, -1)), (hidden, kernel, ids, log_sum)


def _backward(cut: Cut, saved: tuple[Array, ...], grad: Float[Array, "B N"]) -> tuple[Array, Array, None]:
    hidden, kernel, ids, log_sum = saved
    shards, h = _shards(kernel, cut), hidden.astype(cut.dtype)

    def body(carry, index):
        to_hidden, to_shards = carry
        logits, hit, weight = _logits(hidden, shards, ids, index, cut)
        error = jnp.exp(logits - log_sum[..., None, None, None]) - hit
        error = (error * grad[..., None, None, None]).astype(cut.dtype)
        to_hidden += jnp.einsum("bntfc,dtfc->tbnd", error, weight, preferred_element_type=jnp.float32)
        to_weight = jnp.einsum("bnd,bntfc->dtfc", h, error, preferred_element_type=jnp.float32)
        start = _start(index, cut)
        seen = jax.lax.dynamic_slice_in_dim(to_shards, start, cut.size, axis=3)
        # Columns that the last piece shares with the one before have no error in it.
        to_shards = jax.lax.dynamic_update_slice_in_dim(to_shards, seen + to_weight, start, axis=3)
        return (to_hidden, to_shards), None

    # One sum over `tensor` after the loop, not one in every turn.
    zeros = _spread(jnp.zeros((cut.tensor, *hidden.shape), jnp.float32), "tensor", FREE, FREE, FREE)
    start = _spread(jnp.zeros(shards.shape, jnp.float32), FREE, "tensor", FREE, FREE)
    (to_hidden, to_shards), _ = jax.lax.scan(body, (zeros, start), jnp.arange(cut.count))
    return to_hidden.sum(0).astype(hidden.dtype), to_shards.reshape(kernel.shape).astype(kernel.dtype), None


_nats.defvjp(_forward, _backward)


def _shards(kernel: Array, cut: Cut) -> Float[Array, "D T F own"]:
    shards = kernel.reshape(kernel.shape[0], cut.tensor, cut.fsdp, cut.own)
    return _spread(shards, FREE, "tensor", FREE, FREE)


def _start(index: Array, cut: Cut) -> Array:
    return jnp.minimum(index * cut.size, cut.own - cut.size)


def _logits(hidden: Array, shards: Array, ids: Array, index: Array, cut: Cut) -> tuple[Array, Array, Array]:
    """f32 logits `[B, N, T, F, c]` of a piece, which of them are the targets', and its columns `[D, T, F, c]`."""
    start = _start(index, cut)
    weight = jax.lax.dynamic_slice_in_dim(shards, start, cut.size, axis=3).astype(cut.dtype)
    # Twice: cut out where it lies, then fetched over `fsdp`. With the second alone, XLA fetches all and then cuts.
    weight = _spread(_spread(weight, FREE, "tensor", FREE, FREE), None, "tensor", None, None)
    logits = jnp.einsum("bnd,dtfc->bntfc", hidden.astype(cut.dtype), weight, preferred_element_type=jnp.float32)
    place = start + jnp.arange(cut.size)
    column = place + cut.own * jnp.arange(cut.tensor * cut.fsdp).reshape(cut.tensor, cut.fsdp, 1)
    hit = column == ids[..., None, None, None]
    if cut.count * cut.size != cut.own:
        fresh = place >= index * cut.size
        logits, hit = jnp.where(fresh, logits, -jnp.inf), hit & fresh
    return logits, hit, weight


def _spread(x: Array, *axes) -> Array:
    """Pins `x` to the mesh of the context, if there is one; `tensor` only where it divides the axis."""
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.axis_names:
        return x
    ways = mesh.shape.get("tensor", 0)
    fits = [a != "tensor" or (ways and n % ways == 0) for a, n in zip(axes, x.shape, strict=True)]
    spec = PartitionSpec(*(a if fit else None for a, fit in zip(axes, fits, strict=True)))
    return jax.lax.with_sharding_constraint(x, spec)
