"""The plain head: one linear layer, whose numbers the field's process interprets."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.interfaces import FieldSpec, Guide
from src.models.heads._last import last_linear
from src.models.heads.chunked_cross_entropy import nll_of_logits


class LinearHead(nnx.Module):
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

    def __call__(self, hidden: Float[Array, "*B D"], cond: Array | None = None) -> Float[Array, "*B outputs"]:
        """The numbers; `cond` is not used."""
        return self.linear(hidden)

    def noise(self, key: Array, shape: tuple[int, int]) -> tuple[()]:
        """Nothing: the loss is not random."""
        return ()

    def nll(self, hidden: Float[Array, "B N D"], target: Array, noise: tuple[()] = ()) -> Float[Array, "B N"]:
        """Cross-entropy of ids [B, N], mean squared error of vectors [B, N, P].

        Raises ValueError for tokens of several counts, which have neither.
        """
        if self.spec.features is None:
            return nll_of_logits(self(hidden), target)
        if self.spec.vocab is None:
            return ((self(hidden) - target) ** 2).mean(-1)
        raise ValueError("head.name=linear has no next-token loss for several counts a token: give a process")

    def sample(
        self, key: Array, hidden: Float[Array, "B D"], guide: Guide, choose: Callable[[Array, Array], Array]
    ) -> Array:
        """The next id, or the mean vector, of each row that `guide` leaves; the time of what is not known is 1."""
        output = guide(self(hidden), jnp.float32(1))
        return choose(key, output) if self.spec.features is None else output
