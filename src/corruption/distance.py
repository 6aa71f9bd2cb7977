"""A categorical process in which an id is more often replaced by a near one: D3PM's discretised Gaussian in continuous
time.

1. Rates K(i, j) = exp(-(i - j)² / (2 width²)) between ids i ≠ j, and L = K - diag(row sums of K): symmetric, so that
   the noise tends to the uniform law.
2. q(x_t | x_s) = expm(L u), with u(t) - u(s) = u. In the eigenvectors U of L = -U diag(l) U', 0 = l_0 < l_1 <= …,
       q(x_t = j | x_s = i) = sum over k of U(i, k) (abar(t) / abar(s))^(l_k / l_1) U(j, k),
   where abar = exp(-l_1 u) is the schedule: what is left of the slowest mode.
3. For a small step the matrix is I + L u, the form of D3PM's, whose width grows with the noise level; here it is fixed,
   and so the matrices of all times commute. With a large width it is the uniform kernel.

Sources: Austin et al. 2021 "D3PM" (appendix A.2.2), Campbell et al. 2022 (Gaussian rates in continuous time).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from src.corruption.base import expand
from src.corruption.categorical import TINY, Categorical
from src.interfaces import Corrupted


@dataclasses.dataclass(frozen=True, kw_only=True)
class Distance(Categorical):
    """A process on ids whose order has a meaning (grey levels, bins); there is no mask id.

    schedule   abar(t) of the slowest mode
    width      standard deviation of the rates, in ids

    Raises ValueError for a width that is not positive, a mask, a marginal, and less than 2 ids.
    """

    mask: float | int = 0.0
    width: float | int = 1.0

    def __post_init__(self):
        super().__post_init__()
        if self.mask != 0 or self.marginal is not None or self.absorbing or self.rehash:
            raise ValueError("Distance has no mask ids and tends to the uniform law: give no mask and no marginal.")
        if not self.width > 0 or self.field.vocab < 2:
            raise ValueError(f"Distance: width={self.width} must be above 0, and the field have 2 ids or more.")

    def modes(self, t: Float[Array, "..."], s: Float[Array, "..."] | float = 0.0) -> Float[Array, "... V"]:
        """(abar(t) / abar(s))^(l_k / l_1) of each mode."""
        late, early = self.schedule.keep(t), self.schedule.keep(s)
        ratio = jnp.where(early > 0, late / jnp.maximum(early, TINY), jnp.where(jnp.asarray(t) > s, 0.0, 1.0))
        powers = jnp.asarray(_spectrum(self.field.vocab, float(self.width))[0])
        return jnp.where(powers > 0, jnp.maximum(ratio, 0.0)[..., None] ** powers, 1.0)

    def transition(self, x: Int[Array, "*B"], modes: Float[Array, "... V"]) -> Float[Array, "*B V"]:
        """The row of id x, which is also its column; the row of the identity where no mode has decayed."""
        vectors = jnp.asarray(_spectrum(self.field.vocab, float(self.width))[1])
        product = jnp.einsum("...k,vk->...v", vectors[x] * modes, vectors, precision=jax.lax.Precision.HIGHEST)
        still = (modes >= 1).all(axis=-1, keepdims=True)
        return jnp.where(still, x[..., None] == jnp.arange(self.field.vocab), jnp.maximum(product, 0.0))

    # ---- what the base class has for kernels of its form

    def corrupt(self, x0: Int[Array, "*B"], noise: dict[str, Array], t: ArrayLike) -> Corrupted:
        """The id at which the cumulated probabilities exceed the uniform number."""
        below = jnp.cumsum(self.likelihood(x0, expand(t, x0)), axis=-1)[..., :-1]
        drawn = (noise["uniform"][..., None] >= below).sum(axis=-1)
        xt = jnp.where(self.known(x0, t), x0, drawn).astype(x0.dtype)
        return Corrupted(x0=x0, xt=xt, t=t, noise=noise)

    def known(self, xt: Int[Array, "*B"], t: ArrayLike) -> Bool[Array, "*B"]:
        """Whether x_t must equal x_0: at times without noise."""
        return jnp.broadcast_to(self.schedule.keep(expand(t, xt)) >= 1, xt.shape)

    def likelihood(self, xt: Int[Array, "*B"], t: Float[Array, "..."]) -> Float[Array, "*B V"]:
        """q(x_t | x_0) for every x_0."""
        return self.transition(xt, self.modes(t))

    def spread(self, r: Float[Array, "*B V"], s: Float[Array, "..."]) -> Float[Array, "*B V"]:
        """The sum over x_0 of r(x_0) q(x_s = j | x_0), for every id j."""
        modes, vectors = self.modes(s), jnp.asarray(_spectrum(self.field.vocab, float(self.width))[1])
        inner = jnp.einsum("...v,vk->...k", r, vectors, precision=jax.lax.Precision.HIGHEST) * modes
        mixed = jnp.maximum(jnp.einsum("...k,vk->...v", inner, vectors, precision=jax.lax.Precision.HIGHEST), 0.0)
        return jnp.where((modes >= 1).all(axis=-1, keepdims=True), r, mixed)

    def arrival(self, xt: Int[Array, "*B"], t: Float[Array, "..."], s: Float[Array, "..."]) -> Float[Array, "*B V"]:
        """q(x_t | x_s = j) for every id j."""
        return self.transition(xt, self.modes(t, s))


@functools.lru_cache(maxsize=16)
def _spectrum(vocab: int, width: float) -> tuple[np.ndarray, np.ndarray]:
    """l_k / l_1 [V], and the eigenvectors U [V, V], float32; the constant mode is exact."""
    gap = np.arange(vocab)[:, None] - np.arange(vocab)
    rates = np.exp((1 - gap**2) / (2 * width**2))  # only their ratios matter
    np.fill_diagonal(rates, 0.0)
    values, vectors = np.linalg.eigh(np.diag(rates.sum(1)) - rates)
    values[0], vectors[:, 0] = 0.0, 1 / np.sqrt(vocab)
    return np.float32(values / values[1]), np.float32(vectors)
