"""DiT's final layer (Peebles & Xie 2023, arXiv 2212.09748): a normalised state, modulated by the condition."""

from __future__ import annotations

from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.interfaces import FieldSpec
from src.models.heads._last import last_linear
from src.models.layers import LayerNorm, linear


class AdaLNHead(nnx.Module):
    """LayerNorm, shift and scale by the conditioning vector, linear to `outputs` numbers per token, f32.

    A process with a learned variance has twice the outputs: the value comes first, then as many logits.

    order            `crs` puts the features as the input has them (channel, row, column); `rsc` is MonoFormer's and
                     DiT's published output order (row, column, channel), turned into `crs` here
    channels         of the images behind the patches; only `rsc` needs them
    unused_variance  the layer computes a variance that is thrown away, as the published SiT's does; kept so that its
                     parameter count can be met

    Raises ValueError for an unknown order, for `rsc` with channels that do not divide the features, and for a variance
    that is both learned and thrown away.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        init: str | float = 0.0,
        adaln_init: str | float = 0.0,
        order: str = "crs",
        channels: int | None = None,
        unused_variance: bool = False,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if order not in ("crs", "rsc"):
            raise ValueError(f"head.order={order!r} is unknown; use crs or rsc")
        if order == "rsc" and (not channels or not spec.features or spec.features % channels):
            raise ValueError(
                f"head.channels={channels} must divide the {spec.features} features of a token, because "
                "order='rsc' sorts them by channel: give the number of channels"
            )
        if unused_variance and outputs != spec.features:
            raise ValueError(
                "head.unused_variance=True throws away a variance that the field's process wants to "
                "learn: set it to False, or process.variance to a fixed one"
            )
        size = 2 * outputs if unused_variance else outputs
        self.order, self.outputs = order, outputs
        self.pixels = spec.features // channels if order == "rsc" else None
        self.norm = LayerNorm(width, dtype=dtype)
        self.adaln = linear(width, 2 * width, init=adaln_init, bias=True, dtype=dtype, rngs=rngs)
        self.linear = last_linear(width, size, init=init, bias=True, dtype=dtype, rngs=rngs)

    def __call__(self, hidden: Float[Array, "B N D"], cond: Float[Array, "B T D"]) -> Float[Array, "B N outputs"]:
        """The outputs of the process; `cond` has one vector a row (T = 1) or one a token."""
        shift, scale = jnp.split(self.adaln(jax.nn.silu(cond)), 2, axis=-1)
        out = self.linear(self.norm(hidden) * (1 + scale) + shift)
        if self.order == "rsc":
            shape = (*out.shape[:-1], self.pixels, out.shape[-1] // self.pixels)
            out = out.reshape(shape).swapaxes(-1, -2).reshape(out.shape)
        return out[..., : self.outputs]

    def noise(self, key: Array, shape: tuple[int, int]) -> NoReturn:
        """There is no next-token loss. Raises ValueError."""
        raise _no_tokens()

    def nll(self, hidden: Array, target: Array, noise: Any) -> NoReturn:
        """There is no next-token loss. Raises ValueError."""
        raise _no_tokens()

    def sample(self, key: Array, hidden: Array, guide: Any, choose: Any) -> NoReturn:
        """There is no next token. Raises ValueError."""
        raise _no_tokens()


def _no_tokens() -> ValueError:
    return ValueError(
        "head.name=adaln denoises and makes no tokens one by one: use the objective diffusion and the "
        "decoder blocks, or another head (token_diffusion, categorical)"
    )
