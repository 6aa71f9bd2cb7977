"""The plain head: one linear layer, whose numbers the field's process interprets."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.interfaces import FieldSpec
from src.models.heads._last import OneLayer, last_linear
from src.models.heads.chunked_cross_entropy import nll_of_logits


class LinearHead(OneLayer):
    """`outputs` numbers per token, f32: logits of masked diffusion, rates, vectors.

    Without a process, ids have the cross-entropy and are drawn from the logits. Vectors then have the mean squared
    error: such a head predicts the mean, which is the control of `token_diffusion` and no generator.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        init: str | float = 0.02,
        bias: bool = True,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        self.spec = spec
        self.linear = last_linear(width, outputs, init=init, bias=bias, dtype=dtype, rngs=rngs)

    def nll(self, hidden: Float[Array, "B N D"], target: Array, noise: tuple[()] = ()) -> Float[Array, "B N"]:
        """Cross-entropy of ids [B, N], mean squared error of vectors [B, N, P].

        Raises ValueError for tokens of several counts, which have neither.
        """
        if self.spec.features is None:
            return nll_of_logits(self(hidden), target)
        if self.spec.vocab is None:
            return ((self(hidden) - target) ** 2).mean(-1)
        raise ValueError("head.name=linear has no next-token loss for several counts a token: give a process")
