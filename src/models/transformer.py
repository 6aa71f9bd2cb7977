"""The transformer: a scanned stack of pre-norm blocks. Its inputs are vectors and a SequenceSpec, and no fields."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from src.common.mesh.constraints import constrain, platform
from src.common.mesh.fsdp import GATHERED
from src.interfaces import PyTree, SequenceSpec
from src.models import layers, rotary
from src.models.attention import Attend, Attention, Sizes, find_backend, prepare_attention
from src.models.conditioning import Condition, Modulation, modulate
from src.models.mixture_of_transformers import OwnParts, check_parts, part

NORMS = {"rms": layers.RMSNorm, "layer": layers.LayerNorm}
MLPS = {"swiglu": layers.SwiGLU, "gelu": layers.GELU}
UNROLLED = 8  # layers in a row instead of a loop on CPU, where a loop spends a third of a small step on its buffers


def _all_but_weights(primitive, *inputs, **options) -> bool:
    """Whether "none" keeps a result: all but weights that were cast or gathered. All layers of them together would be
    the whole model, on every device."""
    made = primitive.name in ("convert_element_type", "all_gather", "sharding_constraint")
    weight = made and inputs[0].ndim <= 2  # activations have rows, places, features
    return not weight and options.get("name") != GATHERED


REMAT = {
    "none": _all_but_weights,
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
        jax.checkpoint_policies.save_only_these_names("attention"),
    ),
    "names": jax.checkpoint_policies.save_only_these_names("attention", "attention_branch", "mlp_branch"),
    "full": jax.checkpoint_policies.nothing_saveable,
}


def _unchanged(params: PyTree) -> PyTree:
    return params


@dataclasses.dataclass(frozen=True)
class Runtime:
    """The environment of a pass of the trunk, beside its parameters.

    fetch      makes one layer's parameters usable, where they are split over devices
    measure    h [B, S, D] -> a tree of small arrays of every block's output; the pass gives them back
    """

    fetch: Callable[[PyTree], PyTree] = _unchanged
    measure: Callable[[Array], PyTree] | None = None


class Cache(NamedTuple):
    """Keys and values `[L, B, K, S, h]` of a whole row, and its SequenceSpec; slots not yet written have segment 0."""

    k: Float[Array, "L B K S h"]
    v: Float[Array, "L B K S h"]
    spec: SequenceSpec


class Block(nnx.Module):
    """h += gate · attention(norm h); h += gate · mlp(norm h), each optionally modulated by the condition.

    mot: the parts that some tokens have for themselves, or None (`models/mixture_of_transformers.py`)
    """

    def __init__(self, config: Transformer, *, rngs: nnx.Rngs):
        c, args = config, {"init": config.init, "bias": config.bias, "dtype": config.dtype, "rngs": rngs}
        norm = functools.partial(NORMS[c.norm], c.width, epsilon=c.norm_epsilon, dtype=c.dtype, rngs=rngs)
        self.attention_norm, self.mlp_norm = norm(), norm()
        self.attention = Attention(
            *(c.width, c.heads, c.kv_heads, c.head_dim),
            qk_norm=c.norm_epsilon if c.qk_norm else None,
            rope=c.rope,
            magnitude=rotary.rotary_magnitude(c.rope_scaling),
            qkv_bias=c.qkv_bias,
            **args,
        )
        self.mlp = MLPS[c.mlp](c.width, c.mlp_width, **args)
        self.modulation = c.layer(c.width, dtype=c.dtype, rngs=rngs) if c.layer else None
        self.mot = OwnParts(self, c.mot) if c.mot else None

    def __call__(self, x, attend: Attend, angles, condition: Condition, cache=None, start=None):
        kinds = condition.own
        of = functools.partial(part, self, self.mot, kinds=kinds)
        m = self.modulation(condition) if self.modulation is not None else Modulation()
        x = x if m.add is None else x + m.add
        with jax.named_scope("attention"):
            y = modulate(of("attention_norm")(x), m.shift_attention, m.scale_attention)
            y, cache = self.attention(y, attend, angles, cache, start, getattr(self.mot, "attention", None), kinds)
            y = checkpoint_name(y, "attention_branch")
            x = x + (y if m.gate_attention is None else m.gate_attention * y)
        with jax.named_scope("feed_forward"):
            y = checkpoint_name(of("mlp")(modulate(of("mlp_norm")(x), m.shift_mlp, m.scale_mlp)), "mlp_branch")
            return x + (y if m.gate_mlp is None else m.gate_mlp * y), cache


class Transformer(nnx.Module):
    """A stack of L blocks and a final norm. Defaults are Llama's (Touvron et al. 2023): RMSNorm, RoPE, GQA, SwiGLU.

    layer:      the module that conditions a block (`models/conditioning.py`), or None
    attention:  a file of `models/backends`, or auto: the one for the platform, the length and the sizes
    remat:      what the backward pass recomputes: none | dots (all but products with weights) | names (all but what
                attention gives, before and after its projection, and the mlp's output where a gate needs it) | full
    init:       deviation of the kernels, or the name of an initializer
    mot:        parts of a block that the tokens of some fields have of their own (`models/mixture_of_transformers.py`)
    head_dim:   of a head; 0: width / heads
    bias:       of every linear layer; qkv_bias: of the projections to q, k and v alone
    rope_scaling: of the rotary frequencies, see `rotary.rotary_frequencies`
    sliding_window: slots that a query sees, its own included (Beltagy et al. 2020, arXiv 2004.05150); 0: all before it

    Raises ValueError when heads, kv_heads and width do not divide, or a name is unknown.
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        kv_heads: int | None = None,
        mlp_width: int | None = None,
        head_dim: int = 0,
        *,
        norm: str = "rms",
        norm_epsilon: float = 1e-5,
        final_norm: bool = True,
        mlp: str = "swiglu",
        bias: bool = False,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        rope: bool = True,
        rope_theta: float = 10_000.0,
        rope_scaling: tuple | list = (),
        sliding_window: int = 0,
        attention: str = "auto",
        remat: str = "none",
        init: str | float = 0.02,
        mot: tuple[str, ...] = (),
        layer: type | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.width, self.depth, self.heads, self.kv_heads = width, depth, heads, heads if kv_heads is None else kv_heads
        self.mlp_width = 4 * width if mlp_width is None else mlp_width
        self.head_dim = head_dim or width // max(heads, 1)
        self.norm, self.norm_epsilon, self.mlp = norm, norm_epsilon, mlp
        self.bias, self.qkv_bias, self.qk_norm = bias, qkv_bias, qk_norm
        self.rope, self.rope_theta, self.rope_scaling = rope, rope_theta, tuple(rope_scaling)
        self.sliding_window = sliding_window
        self.remat, self.init = remat, init
        self.layer, self.attention, self.dtype, self.mot = layer, attention, dtype, check_parts(mot)
        self._check(given=bool(head_dim))
        self.layers = nnx.vmap(lambda keys: Block(self, rngs=keys))(rngs.fork(split=depth))
        self.final_norm = NORMS[norm](width, epsilon=norm_epsilon, dtype=dtype, rngs=rngs) if final_norm else None

    def _check(self, given: bool):
        for option, value, known in (("norm", self.norm, NORMS), ("mlp", self.mlp, MLPS), ("remat", self.remat, REMAT)):
            if value not in known:
                raise ValueError(f"model.trunk.{option}={value!r} is unknown; use one of {', '.join(known)}")
        find_backend(self.attention)
        rotary.rotary_frequencies(1, self.rope_theta, self.rope_scaling)
        names = ("width", "depth", "heads", "kv_heads", "mlp_width", *(("head_dim",) if given else ()))
        small = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) < 1]
        if small:
            raise ValueError(f"model.trunk.{small[0]} must be at least 1")
        if self.sliding_window < 0:
            raise ValueError(f"model.trunk.sliding_window={self.sliding_window} must be 0, for none, or at least 1")
        if self.width % self.heads and not given:
            raise ValueError(f"model.trunk.width={self.width} is not divisible by heads={self.heads}")
        if self.heads % self.kv_heads:
            raise ValueError(f"model.trunk.heads={self.heads} is not divisible by kv_heads={self.kv_heads}")
        if self.rope and self.head_dim % 2:
            raise ValueError(f"model.trunk: rotary positions need an even head size, got {self.head_dim}")

    def __call__(
        self,
        x: Float[Array, "B Q D"],
        spec: SequenceSpec,
        condition: Condition,
        cache: Cache | None = None,
        start: int | Int[Array, ""] = 0,
        runtime: Runtime = Runtime(),
    ) -> tuple[Float[Array, "B Q D"], Cache | None, PyTree]:
        """Hidden states after the final norm, the cache, and what `runtime` measures, with a first axis of layers.

        With a cache, x takes its slots from `start` on and sees those before.
        """
        if cache is not None:
            write = jax.vmap(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, start, axis=0))
            cache = cache._replace(spec=cache.spec.replace(segment=write(cache.spec.segment, spec.segment)))
        attend = self._attend(spec, cache, *x.shape[:2])
        slots = x.shape[1] if cache is None else cache.k.shape[3]
        angles = rotary.rotary_angles(spec.position, self.head_dim, self.rope_theta, self.rope_scaling, slots)
        graph, stacked = nnx.split(self.layers)

        def body(carry, per_layer):
            (h, stored), (params, layer) = carry, per_layer
            block = nnx.merge(graph, nnx.State(runtime.fetch(nnx.to_pure_dict(params))))
            with jax.named_scope("block"):  # of all layers: the program has one body for them
                h, stored = block(h, attend, angles, condition, stored and (*stored, layer), start)
            seen = None if runtime.measure is None else runtime.measure(h)
            return (constrain(h, "rows", "places", None), stored and stored[:2]), seen

        if cache is None:  # nothing is trained through a cache
            body = jax.checkpoint(body, policy=REMAT[self.remat], prevent_cse=False)
        stored = None if cache is None else (cache.k, cache.v)
        # Unrolled, the compiler finds that the recomputed values equal the kept ones.
        shallow = platform() == "cpu" and cache is None and self.depth <= UNROLLED and self.remat == "none"
        numbers = jnp.arange(self.depth)
        carry, seen = jax.lax.scan(body, (x, stored), (stacked, numbers), unroll=self.depth if shallow else 1)
        x, stored = carry
        x = x if self.final_norm is None else self.final_norm(x)
        return x, None if cache is None else cache._replace(k=stored[0], v=stored[1]), seen

    def _attend(self, spec: SequenceSpec, cache: Cache | None, rows: int, length: int) -> Attend:
        """Attention as the rows allow it, prepared once for all layers."""
        keys = length if cache is None else cache.k.shape[3]
        heads = (self.heads, self.kv_heads, self.head_dim)
        sizes = Sizes(rows, length, keys, *heads, self.dtype, platform())
        seen = spec if cache is None else cache.spec
        if 0 < self.sliding_window < keys:  # a longer one changes nothing, and kernels are faster without
            spec = spec.replace(window=self.sliding_window)
        return prepare_attention(self.attention, spec, seen, sizes, cached=cache is not None)

    def empty_cache(self, spec: SequenceSpec, rows: int, dtype=None) -> Cache:
        """A cache for rows of the layout behind `spec`, with nothing written yet."""
        length = spec.write.shape[-1]
        shape = (self.depth, rows, self.kv_heads, length, self.head_dim)
        zeros = jnp.zeros(shape, dtype or self.dtype)
        return Cache(zeros, zeros, spec.replace(segment=jnp.zeros((rows, length), jnp.int32)))
