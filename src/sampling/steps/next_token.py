"""The choice of the next token: `(key, logits [B, V]) -> ids [B]`.

Sources: Fan et al. 2018 (top-k); Holtzman et al. 2020 (top-p, "nucleus").
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Greedy:
    """The most likely token; of several, the first."""

    def __call__(self, key: Array, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        """argmax over V; the key is not used."""
        return jnp.argmax(logits, axis=-1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampled:
    """A draw from softmax(logits / temperature), truncated to the `top_k` most likely tokens and then, among these, to
    the smallest set of most likely tokens with total probability >= `top_p`.

    Raises ValueError unless temperature > 0, top_k >= 1 and 0 < top_p <= 1.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"Sampled: temperature is {self.temperature}; give one above 0, or take Greedy.")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"Sampled: top_k is {self.top_k}; give at least 1, or None to keep all tokens.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampled: top_p is {self.top_p}; give a mass in (0, 1], or None to keep all tokens.")

    def __call__(self, key: Array, logits: Float[Array, "B V"]) -> Int[Array, " B"]:
        """One token per row."""
        kept, ids = self.candidates(logits)
        choice = jax.random.categorical(key, kept, axis=-1)
        return jnp.take_along_axis(ids, choice[:, None], axis=-1)[:, 0]

    def candidates(self, logits: Float[Array, "B V"]) -> tuple[Float[Array, "B K"], Int[Array, "B K"]]:
        """Logits of the kept tokens, largest first (-inf: removed), and their ids; K = min(top_k, V)."""
        size = logits.shape[-1] if self.top_k is None else min(self.top_k, logits.shape[-1])
        scaled = logits.astype(jnp.float32) / self.temperature
        kept, ids = jax.lax.top_k(scaled, size)
        if self.top_p is not None and self.top_p < 1:
            mass = jax.nn.softmax(kept, axis=-1)
            before = jnp.cumsum(mass, axis=-1) - mass
            # a token is kept while the mass before it is below top_p; the first always
            stays = (before < self.top_p).at[:, 0].set(True)
            kept = jnp.where(stays, kept, -jnp.inf)
        return kept, ids
