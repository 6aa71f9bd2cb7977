"""Logits of ids, with a loss that never makes the logits of all tokens when the vocabulary is large."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from src.interfaces import FieldSpec
from src.models.heads._last import OneLayer, last_linear
from src.models.heads.chunked_cross_entropy import nll_in_pieces, nll_of_logits
from src.models.heads.chunked_kl import Side, divergence_in_pieces


class CategoricalHead(OneLayer):
    """Logits over the vocabulary without bias, f32.

    chunk   most entries of the vocabulary whose logits a device makes at a time for the loss; a smaller one is not cut
    tied    the matrix is that of the field's embedding, `table`, transposed (Press & Wolf 2017, arXiv 1608.05859), and
            not one of its own

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
        tied: bool = False,
        table: nnx.Embed | None = None,
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.vocab is None or spec.features is not None:
            raise ValueError(f"head.name=categorical needs tokens that are ids, and they are {spec}; use linear")
        if chunk < 1:
            raise ValueError(f"head.chunk={chunk} must be at least 1")
        self.spec, self.chunk, self.dtype, self.outputs = spec, chunk, dtype, outputs
        if tied:
            self.table = table
        else:
            self.linear = last_linear(width, outputs, init=init, bias=False, dtype=dtype, rngs=rngs)

    @property
    def kernel(self) -> Float[Array, "D V"]:
        """The matrix; of a table with mask ids behind the others its first rows."""
        return self.table.embedding[...][: self.outputs].T if hasattr(self, "table") else self.linear.kernel[...]

    def __call__(self, hidden: Float[Array, "*B D"], cond: Array | None = None) -> Float[Array, "*B outputs"]:
        """The logits, f32; `cond` is not used."""
        if not hasattr(self, "table"):
            return super().__call__(hidden)
        last = (((hidden.ndim - 1,), (0,)), ((), ()))
        inputs = (hidden.astype(self.dtype), self.kernel.astype(self.dtype))
        return jax.lax.dot_general(*inputs, last, preferred_element_type=jnp.float32)

    def nll(self, hidden: Float[Array, "B N D"], target: Int[Array, "B N"], noise: tuple[()] = ()) -> Array:
        """-log p(target | hidden), [B, N]."""
        kernel = self.kernel
        if kernel.shape[1] <= self.chunk:
            return nll_of_logits(self(hidden), target)
        return nll_in_pieces(hidden, kernel, target, chunk=self.chunk, dtype=self.dtype)

    def divergence(
        self, hidden: Float[Array, "B N D"], teacher: CategoricalHead, taught: Float[Array, "B N D"], temperature: float
    ) -> Float[Array, "B N"]:
        """temperature² · KL(teacher(taught) || self(hidden)) of the next token; the teacher gets no gradient."""
        ours, theirs = Side(hidden, self.kernel), Side(taught, teacher.kernel)
        return divergence_in_pieces(ours, theirs, temperature=temperature, chunk=self.chunk, dtype=self.dtype)
