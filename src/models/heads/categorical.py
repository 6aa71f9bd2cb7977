"""Logits of ids, with a loss that never makes the logits of all tokens when the vocabulary is large."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.heads._last import OneLayer, last_linear
from src.models.heads.chunked_cross_entropy import nll_in_pieces, nll_of_logits
from src.models.heads.chunked_kl import Side, divergence_in_pieces


class CategoricalHead(OneLayer):
    """Logits over the vocabulary; a matrix of its own (not tied to the embedding), no bias. All results are f32.

    chunk   most entries of the vocabulary whose logits a device makes at a time for the loss; a smaller one is not cut

    Raises ValueError for tokens that are not ids, and for a chunk below 1.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        init: str | float = 0.02,
        chunk: int = 8192,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.vocab is None or spec.features is not None:
            raise ValueError(f"head.name=categorical needs tokens that are ids, and they are {spec}; use linear")
        if chunk < 1:
            raise ValueError(f"head.chunk={chunk} must be at least 1")
        self.spec, self.chunk, self.dtype = spec, chunk, dtype
        self.linear = last_linear(width, outputs, init=init, bias=False, dtype=dtype, rngs=rngs)

    def nll(self, hidden: Float[Array, "B N D"], target: Int[Array, "B N"], noise: tuple[()] = ()) -> Array:
        """-log p(target | hidden), [B, N]."""
        kernel = self.linear.kernel[...]
        if kernel.shape[1] <= self.chunk:
            return nll_of_logits(self(hidden), target)
        return nll_in_pieces(hidden, kernel, target, chunk=self.chunk, dtype=self.dtype)

    def divergence(
        self, hidden: Float[Array, "B N D"], teacher: CategoricalHead, taught: Float[Array, "B N D"], temperature: float
    ) -> Float[Array, "B N"]:
        """temperature² · KL(teacher(taught) || self(hidden)) of the next token; the teacher gets no gradient."""
        ours, theirs = Side(hidden, self.linear.kernel[...]), Side(taught, teacher.linear.kernel[...])
        return divergence_in_pieces(ours, theirs, temperature=temperature, chunk=self.chunk, dtype=self.dtype)
