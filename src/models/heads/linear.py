"""How hidden states become predictions."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import Prediction
from src.models.heads.chunked_cross_entropy import nats_in_pieces, nats_of_logits
from src.models.heads.chunked_kl import Side, divergence_in_pieces
from src.models.layers import LayerNorm, initializer, linear


def _last(d_in: int, d_out: int, *, init, bias: bool, dtype, rngs: nnx.Rngs) -> nnx.Linear:
    """A linear layer whose products are in `dtype` and whose result is f32, never rounded on the way."""
    args = {"use_bias": bias, "kernel_init": initializer(init), "dtype": dtype, "rngs": rngs}
    return nnx.Linear(d_in, d_out, preferred_element_type=jnp.float32, **args)


class TextHead(nnx.Module):
    """Logits over the vocabulary; a matrix of its own (not tied to the embedding), no bias. Both results are f32.

    chunk: most entries of the vocabulary whose logits a device makes at a time for the loss; a smaller one is not cut.
    Raises ValueError for a chunk below 1.
    """

    def __init__(
        self,
        width: int,
        vocab: int,
        *,
        init: str | float = 0.02,
        chunk: int = 8192,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if chunk < 1:
            raise ValueError(f"model.text_head.chunk={chunk} must be at least 1")
        self.chunk, self.dtype = chunk, dtype
        self.linear = _last(width, vocab, init=init, bias=False, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        return self.linear(hidden)

    def nats(self, hidden: Float[Array, "B N D"], ids: Int[Array, "B N"]) -> Float[Array, "B N"]:
        """-log p(ids | hidden)."""
        kernel = self.linear.kernel[...]
        if kernel.shape[1] <= self.chunk:
            return nats_of_logits(self(hidden), ids)
        return nats_in_pieces(hidden, kernel, ids, chunk=self.chunk, dtype=self.dtype)

    def divergence(
        self, hidden: Float[Array, "B N D"], teacher: TextHead, taught: Float[Array, "B N D"], temperature: float
    ) -> Float[Array, "B N"]:
        """temperature² · KL(teacher(taught) || self(hidden)) of the next token; the teacher gets no gradient."""
        ours, theirs = Side(hidden, self.linear.kernel[...]), Side(taught, teacher.linear.kernel[...])
        return divergence_in_pieces(ours, theirs, temperature=temperature, chunk=self.chunk, dtype=self.dtype)


class ImageHead(nnx.Module):
    """LayerNorm, adaLN by the conditioning vector, linear to patch features (DiT's final layer).

    variance: `none` · `learned` (as many variance logits beside the value) · `unused` (the published SiT computes
              them and throws them away; kept so that its parameter count can be met)
    order:    `crs` puts the features as the input has them (channel, row, column); `rsc` is MonoFormer's and DiT's
              published output order (row, column, channel), turned into `crs` here.
    """

    def __init__(
        self,
        width: int,
        features: int,
        channels: int,
        *,
        variance: str = "none",
        order: str = "crs",
        init: str | float = 0.0,
        adaln_init: str | float = 0.0,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if variance not in ("none", "learned", "unused"):
            raise ValueError(f"model.image_head.variance={variance!r} is unknown; use none, learned or unused")
        if order not in ("crs", "rsc"):
            raise ValueError(f"model.image_head.order={order!r} is unknown; use crs or rsc")
        self.variance, self.order = variance, order
        self.channels = channels * (1 if variance == "none" else 2)
        self.norm = LayerNorm(width, dtype=dtype)
        self.adaln = linear(width, 2 * width, init=adaln_init, bias=True, dtype=dtype, rngs=rngs)
        size = features * (1 if variance == "none" else 2)
        self.linear = _last(width, size, init=init, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B N D"], vector: Float[Array, "B T D"]) -> Prediction:
        shift, scale = jnp.split(self.adaln(jax.nn.silu(vector)), 2, axis=-1)
        out = self.linear(self.norm(hidden) * (1 + scale) + shift)
        if self.order == "rsc":
            pixels = out.shape[-1] // self.channels
            out = out.reshape(*out.shape[:-1], pixels, self.channels).swapaxes(-1, -2).reshape(out.shape)
        if self.variance == "none":
            return Prediction(out)
        value, logits = jnp.split(out, 2, axis=-1)
        return Prediction(value, logits if self.variance == "learned" else None)
