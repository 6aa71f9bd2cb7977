"""Splash attention on TPU: blocks of scores stay in fast memory, and blocks that no query sees are skipped."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask import MultiHeadMask, NumpyMask
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import SequenceSpec
from src.models.attention import Sizes
from src.models.backends._mesh import Axes, split
from src.sequence.mask import visible

LANES = 128
BLOCKS = (512, 384, 256, 128)
WASTE = 1.2  # a larger block may make the padded row this much longer than whole lanes would
NAME = "attention"  # by which a policy of `jax.checkpoint` keeps the output and its normalizer


class Splash:
    """softmax(q kᵀ / √h) v block by block, softmax in f32 (Dao et al. 2022; the kernel is the one that comes with JAX).

    With `read`, `write` and `group` as numpy `[S]` the mask is static: empty blocks are never visited, and segments are
    compared in the kernel. When they vary by row, or there is a relation, the blocks to visit are found on the device
    (`_ByRow`), and the mask is an array `[B, S, S]` unless the spec is `contiguous`, as that of packed rows is, and has
    no window.

    Rows are padded to whole blocks with segment 0 and cut again. A query that sees nothing (padding) gets a
    finite value, and no gradient as long as that value is not used.

    The compiler cannot partition a kernel, so it runs under `shard_map` over the mesh in use: rows over `data` and
    `fsdp`, heads over `tensor`, queries over `context`, each where it divides; keys are whole along `context`. On CPU
    the kernel is interpreted, which is slow and for tests.
    """

    def __init__(self, query: SequenceSpec, key: SequenceSpec, sizes: Sizes):
        self.axes = split(sizes)
        self.length, block = _padded(sizes.queries, self.axes.contexts)
        options = {
            "block_sizes": _block_sizes(block, fused=block == self.length),
            "interpret": sizes.platform == "cpu",
            "residual_checkpoint_name": NAME,
        }
        orders = (query.read, key.write, query.group, key.group)
        static = query.relation is None and all(isinstance(a, np.ndarray) and a.ndim == 1 for a in orders)
        self.mask = (_Static if static else _ByRow)(query, key, sizes.rows, self.length, block, self.axes, options)

    @staticmethod
    def refusal(sizes: Sizes) -> str | None:
        """Why it cannot be used for such arrays, or None."""
        if sizes.platform not in ("tpu", "cpu"):
            return f"runs on TPU, not on {sizes.platform}"
        if sizes.queries != sizes.keys:
            return f"needs as many queries as keys, not {sizes.queries} and {sizes.keys}"
        if jnp.dtype(sizes.dtype) not in (jnp.float32, jnp.bfloat16):
            return f"computes in float32 or bfloat16, not {jnp.dtype(sizes.dtype).name}"
        return None

    def __call__(
        self, q: Float[Array, "B Q H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"]
    ) -> Float[Array, "B Q H h"]:
        length = q.shape[1]
        tail = ((0, 0), (0, self.length - length), (0, 0), (0, 0))
        q, k, v = (jnp.pad(a, tail) for a in (q * q.shape[-1] ** -0.5, k.astype(q.dtype), v.astype(q.dtype)))
        run = lambda mask, *qkv: jnp.swapaxes(self.mask.run(mask, *(jnp.swapaxes(a, 1, 2) for a in qkv)), 1, 2)
        return self.axes.over(run, self.mask.specs)(self.mask.arrays, q, k, v)[:, :length]


def _padded(length: int, parts: int) -> tuple[int, int]:
    """The length in whole blocks for each of the parts, and the block: the largest that does not waste too much."""

    def whole(block: int) -> int:
        return -(-length // (block * parts)) * block * parts

    block = next(b for b in BLOCKS if whole(b) <= WASTE * whole(LANES))
    return whole(block), block


def _block_sizes(block: int, fused: bool) -> kernels.BlockSizes:
    """Square blocks. Fused, one backward kernel makes all gradients; it keeps a dq for each block of keys."""
    names = ["block_q", "block_kv", "block_q_dkv", "block_kv_dkv"] + ["block_q_dq", "block_kv_dq"] * (not fused)
    return kernels.BlockSizes(**dict.fromkeys(names, block), use_fused_bwd_kernel=fused)


class _Static:
    """A mask known while tracing, and segments. Every block that is not empty is visited."""

    def __init__(self, query, key, rows: int, length: int, block: int, axes: Axes, options: dict[str, Any]):
        ones = np.ones_like(query.read)
        seen = visible(query.replace(segment=ones), key.replace(segment=ones))
        tail = length - len(ones)
        seen = np.pad(seen, (0, tail))
        # A row of blocks that is never visited would divide by zero.
        seen |= np.eye(length, dtype=bool) & ~seen.any(1, keepdims=True)
        mask = MultiHeadMask([NumpyMask(seen)])
        made = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=axes.contexts, **options)
        self.kwargs = made.kwargs
        made = (made.fwd_mask_info, made.dq_mask_info, made.dkv_mask_info)
        infos = [info and info._replace(is_dynamic_mask=None) for info in made]  # not an array
        segments = (jnp.broadcast_to(spec.segment, (rows, length - tail)) for spec in (query, key))
        self.arrays = (infos, *(jnp.pad(segment, ((0, 0), (0, tail))) for segment in segments))
        # Blocks lie with their queries; the distinct partial ones are everywhere.
        by_block = PartitionSpec(None, axes.context)
        spec = MaskInfo(by_block, by_block, by_block, PartitionSpec(), None)
        specs = [i and MaskInfo(*(s if a is not None else None for s, a in zip(spec, i, strict=True))) for i in infos]
        self.specs = (specs, PartitionSpec(axes.rows, axes.context), PartitionSpec(axes.rows))

    def run(self, arrays, q, k, v) -> Float[Array, "B H Q h"]:
        infos, segment_q, segment_k = arrays
        kernel = kernels.SplashAttentionKernel(*(i and i._replace(is_dynamic_mask=False) for i in infos), **self.kwargs)
        return jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segment_q, segment_k))


class _ByRow:
    """Masks that vary by row. Each row visits the blocks that its queries see, in one kernel for all rows.

    The kernel has one table of blocks for the whole sequence, so rows of several blocks are joined to one sequence, and
    each block of queries has the blocks of keys of its own row in the table (under `vmap` a table of each row would be
    a loop over the rows). Rows of one block have nothing to skip, and are a batch.

    Where the spec is `contiguous`, a query sees its segment up to one slot: an integer a query, compared in the kernel.
    Otherwise the mask is an array `[B, S, S]`.
    """

    def __init__(self, query, key, rows: int, length: int, block: int, axes: Axes, options: dict[str, Any]):
        wide = lambda a: jnp.pad(jnp.broadcast_to(a, (rows, a.shape[-1])), ((0, 0), (0, length - a.shape[-1])))
        self.single = block == length
        by_query = PartitionSpec(axes.rows, axes.context)
        if query.contiguous and query.relation is None and not query.window:
            segment_q, segment_k, last = wide(query.segment), wide(key.segment), wide(_last_seen(query))
            table = _some_seen(segment_q, segment_k, last, block)
            masks, specs = (last, segment_q, segment_k), (by_query, by_query, PartitionSpec(axes.rows))
            function = _up_to
        else:
            seen = visible(query, key)
            tail = (0, length - seen.shape[-1])
            seen = jnp.pad(jnp.broadcast_to(seen, (rows, *seen.shape[-2:])), ((0, 0), tail, tail))
            count = length // block
            blocks = jnp.swapaxes(seen.reshape(rows, count, block, count, block), 2, 3)
            table = blocks.any((3, 4)) + blocks.all((3, 4)).astype(jnp.int32)
            masks, specs, function = (blocks, jnp.swapaxes(blocks, -1, -2)), (by_query, by_query), None
        # A row of blocks that is never visited would divide by zero.
        never = ~(table > 0).any(2, keepdims=True) & jnp.eye(length // block, dtype=bool)
        self.arrays, self.specs = (jnp.where(never, 1, table), *masks), (by_query, *specs)
        self.kwargs = {
            **{"is_mqa": False, "save_residuals": False, "mask_function": function, "attn_logits_soft_cap": None},
            **{"mask_value": kernels.DEFAULT_MASK_VALUE, **options},
        }

    def run(self, arrays, q, k, v) -> Float[Array, "B H Q h"]:
        if self.single:
            one = lambda arrays, *qkv: self._rows(tuple(a[None] for a in arrays), *qkv)
            return jax.vmap(one)(arrays, q, k, v)
        join = lambda a: jnp.swapaxes(a, 0, 1).reshape(a.shape[1], -1, a.shape[3])
        out = self._rows(arrays, join(q), join(k), join(v))
        return jnp.swapaxes(out.reshape(q.shape[1], q.shape[0], *q.shape[2:]), 0, 1)

    def _rows(self, arrays, q, k, v) -> Float[Array, "H BQ h"]:
        """The kernel on rows that are joined to one sequence, or on one row."""
        table, *masks = arrays
        table = None if self.single else table
        if self.kwargs["mask_function"] is None:
            blocks, transposed = (a.reshape(-1, *a.shape[-2:]) for a in masks)
            forward, backward = _mask_info(table, 0, blocks, None), _mask_info(table, 1, transposed, None)
            segments = None
        else:
            last, segment_q, segment_k = masks
            last = (last + jnp.arange(len(last))[:, None] * segment_k.shape[1]).reshape(-1)
            forward, backward = _mask_info(table, 0, None, last), _mask_info(table, 1, None, last)
            segments = kernels.SegmentIds(segment_q.reshape(-1), segment_k.reshape(-1))
        dq = None if self.kwargs["block_sizes"].use_fused_bwd_kernel else forward
        return kernels.SplashAttentionKernel(forward, dq, backward, **self.kwargs)(q, k, v, segments)


def _up_to(last: Int[Array, "q k"], slot: Int[Array, "q k"]) -> Bool[Array, "q k"]:
    """Whether a query sees the slot of a key."""
    return slot <= last


def _last_seen(spec: SequenceSpec) -> Int[Array, "*B S"]:
    """The last slot that each query of a `contiguous` spec sees: its own, or the last of its group."""
    slots = jnp.arange(spec.group.shape[-1], dtype=jnp.int32)
    following = jnp.roll(spec.group, -1, axis=-1).at[..., -1].set(0)
    ends = jnp.where((spec.group == 0) | (spec.group != following), slots, slots.size)
    return jax.lax.cummin(ends, axis=ends.ndim - 1, reverse=True)


def _some_seen(
    segment_q: Int[Array, "B S"], segment_k: Int[Array, "B S"], last: Int[Array, "B S"], block: int
) -> Int[Array, "B m n"]:
    """1 where a query of a block may see a key of a block, 0 where it does not: by the ranges of their segments and
    slots, so that a block too many is possible, and one too few is not."""

    def least_and_most(segment):
        cut = segment.reshape(len(segment), -1, block)
        return jnp.where(cut > 0, cut, jnp.iinfo(cut.dtype).max).min(2), cut.max(2)

    (least_q, most_q), (least_k, most_k) = least_and_most(segment_q), least_and_most(segment_k)
    reach = jnp.where(segment_q > 0, last, -1).reshape(len(last), -1, block).max(2)
    begins = jnp.arange(least_k.shape[1]) * block
    overlap = (least_q[:, :, None] <= most_k[:, None]) & (least_k[:, None] <= most_q[:, :, None])
    return (overlap & (begins <= reach[:, :, None])).astype(jnp.int32)


def _mask_info(table: Int[Array, "B m n"] | None, side: int, blocks: Array | None, last: Array | None) -> MaskInfo:
    """What the kernel reads of rows that are joined: the blocks that it visits, and where it finds their masks.

    table   0: not visited, 1: visited, 2: visited, and all is seen; None: the one block of a row
    side    0: a block of queries goes over the keys; 1: a block of keys goes over the queries
    blocks  the masks of all blocks, or None with `last`, the last slot that each query sees

    Where nothing is visited, the block to fetch is one that is there before or after, so that nothing is copied.
    """
    if table is None:
        zero = None if blocks is None else jnp.zeros((1, 1, 1), jnp.int32)
        return MaskInfo(zero, zero, None if blocks is None else zero + 1, blocks, last, True)
    height, width = table.shape[1:]
    axis, size = 2 - side, table.shape[2 - side]
    row, m, n = (jax.lax.broadcasted_iota(jnp.int32, table.shape, i) for i in range(3))
    number, some = (m if side else n), table > 0
    least = jnp.where(some, number, size - 1).min(axis, keepdims=True)
    most = jnp.where(some, number, 0).max(axis, keepdims=True)
    fetched = jnp.clip(number, least, jnp.maximum(least, most)) + row * size
    masked = None
    if blocks is not None:
        masked = jax.lax.cummax(jnp.where(table == 1, (row * height + m) * width + n, 0), axis=axis)

    def join(a: Array | None) -> Array | None:
        if a is None or side == 0:
            return a if a is None else a.reshape(1, -1, width)
        return jnp.swapaxes(a, 0, 1).reshape(1, height, -1)

    return MaskInfo(join(fetched), join(masked), join(table), blocks, last, True)
