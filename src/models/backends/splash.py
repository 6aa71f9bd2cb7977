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
from jaxtyping import Array, Bool, Float

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
    compared in the kernel. When they vary by row, or there is a relation, the mask is an array `[B, S, S]` and every
    block is visited.

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
        self.mask = (_Static if static else _Dynamic)(query, key, sizes.rows, self.length, block, self.axes, options)

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


class _Dynamic:
    """A mask `[B, S, S]` with the segments in it. All blocks are visited, in the same order for every row.

    The library's own dynamic masks skip empty blocks, but then each row has its own order of blocks, and `vmap` makes a
    loop over the rows of it instead of one kernel.
    """

    def __init__(self, query, key, rows: int, length: int, block: int, axes: Axes, options: dict[str, Any]):
        seen = visible(query, key)
        tail = length - seen.shape[-1]
        seen = jnp.pad(jnp.broadcast_to(seen, (rows, *seen.shape[-2:])), ((0, 0), (0, tail), (0, tail)))
        blocks = jnp.swapaxes(seen.reshape(rows, 1, length // block, block, length // block, block), 3, 4)
        self.arrays = (blocks, jnp.swapaxes(blocks, -1, -2))
        self.specs = (PartitionSpec(axes.rows, None, axes.context),) * 2
        self.kwargs = {
            **{"is_mqa": False, "save_residuals": False, "mask_function": None, "attn_logits_soft_cap": None},
            **{"mask_value": kernels.DEFAULT_MASK_VALUE, **options},
        }

    def run(self, arrays, q, k, v) -> Float[Array, "B H Q h"]:
        def row(blocks: Bool[Array, "1 m n q k"], transposed: Bool[Array, "1 m n k q"], *qkv):
            _, height, width = blocks.shape[:3]
            number = jnp.arange(height * width, dtype=jnp.int32).reshape(1, height, width)
            some = jnp.ones_like(number)  # 1: partly visible
            forward = MaskInfo(number % width, number, some, blocks, None, True)
            backward = MaskInfo(number // width, number, some, transposed, None, True)
            dq = None if self.kwargs["block_sizes"].use_fused_bwd_kernel else forward
            return kernels.SplashAttentionKernel(forward, dq, backward, **self.kwargs)(*qkv)

        return jax.vmap(row)(*arrays, q, k, v)
