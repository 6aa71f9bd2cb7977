"""A few bidirectional blocks over short groups of tokens, inside a head or an embedder."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from src.common.mesh.constraints import platform
from src.interfaces import SequenceSpec
from src.models.attention import Attend, Attention, Sizes, prepare_attention
from src.models.conditioning import AdaLNLayer, Condition, Modulation, modulate
from src.models.layers import GELU, LayerNorm, linear
from src.models.rotary import rotary_angles


class LocalTransformer(nnx.Module):
    """[R, S, W] -> [R, S, W], without a last norm: every token sees its whole group, and has its rotary position in it.

    timed   every block is modulated by one vector of the group (adaLN-zero, Peebles & Xie 2023)

    Raises ValueError where the heads do not divide the width, or leave an odd number of features.
    """

    def __init__(self, width: int, depth: int, heads: int, *, timed: bool, init: str | float, dtype, rngs: nnx.Rngs):
        if width % heads or width // heads % 2:
            raise ValueError(f"a local transformer of width {width} has no {heads} heads of an even size")
        self.width, self.depth, self.heads, self.dtype = width, depth, heads, dtype
        for index in range(depth):
            block = _Block(width, heads, timed, init=init, bias=True, dtype=dtype, rngs=rngs)
            setattr(self, f"block_{index}", block)

    def __call__(self, x: Float[Array, "R S W"], vector: Float[Array, "R 1 W"] | None = None) -> Float[Array, "R S W"]:
        rows, length, _ = x.shape
        zeros, head = np.zeros(length, np.int32), self.width // self.heads
        spec = SequenceSpec(zeros, zeros, zeros, zeros + 1, jnp.arange(length)[:, None])
        sizes = Sizes(rows, length, length, self.heads, self.heads, head, self.dtype, platform())
        attend, angles = prepare_attention("dense", spec, spec, sizes), rotary_angles(spec.position, head, 10_000.0)
        condition = None if vector is None else Condition(vector, zeros)
        for index in range(self.depth):
            x = getattr(self, f"block_{index}")(x, attend, angles, condition)
        return x


class _Block(nnx.Module):
    """x += gate · attention(norm x); x += gate · mlp(norm x), each modulated where it is timed."""

    def __init__(self, width: int, heads: int, timed: bool, *, init, bias: bool, dtype, rngs: nnx.Rngs):
        args = {"init": init, "bias": bias, "dtype": dtype, "rngs": rngs}
        self.norm = LayerNorm(width, dtype=dtype)
        self.attention = Attention(width, heads, heads, width // heads, qk_norm=None, rope=True, **args)
        self.mlp = GELU(width, 4 * width, **args)
        self.modulation = AdaLNLayer(width, dtype=dtype, rngs=rngs) if timed else None

    def __call__(self, x: Array, attend: Attend, angles: Array, condition: Condition | None) -> Array:
        m = Modulation() if self.modulation is None else self.modulation(condition)
        y, _ = self.attention(modulate(self.norm(x), m.shift_attention, m.scale_attention), attend, angles)
        x = x + (y if m.gate_attention is None else m.gate_attention * y)
        y = self.mlp(modulate(self.norm(x), m.shift_mlp, m.scale_mlp))
        return x + (y if m.gate_mlp is None else m.gate_mlp * y)


class Parts(nnx.Module):
    """A vector of P numbers as `count` vectors of P / count numbers each, embedded: [R, P] -> [R, count, W].

    Raises ValueError where the count does not divide P.
    """

    def __init__(self, features: int, count: int, width: int, where: str, **args):
        if count < 1 or features % count:
            raise ValueError(f"{where}.parts={count} must divide the {features} numbers of a token")
        self.count = count
        self.linear = linear(features // count, width, **args)

    def __call__(self, value: Float[Array, "R P"]) -> Float[Array, "R n W"]:
        return self.linear(value.reshape(value.shape[0], self.count, -1))
