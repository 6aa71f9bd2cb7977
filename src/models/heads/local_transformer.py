"""DiTAR's head: a token is a patch of several vectors, which a small bidirectional transformer denoises together.

f reads [state, parts of the `past` clean tokens before, parts of the noisy token], each part one local token; the time
modulates every block (adaLN-zero); a modulated norm and a linear layer give the noisy parts' outputs. Tokens before the
first are 0. Loss and samples: `_token_diffusion.py`.

Source: Jia et al. 2025 "DiTAR" (arXiv 2502.03930: LocDiT).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.corruption.schedules import GVP, Schedule
from src.corruption.timesteps import Stratified, TimestepSampler
from src.interfaces import FieldSpec
from src.models.conditioning import TimestepEmbedder
from src.models.heads._last import last_linear
from src.models.heads._token_diffusion import TokenDiffusion, check_counts
from src.models.layers import LayerNorm, linear
from src.models.local import LocalTransformer, Parts


class LocalTransformerHead(TokenDiffusion):
    """The head of fields without a process whose tokens are patches of vectors, for `next_token` and `left_to_right`.

    parts                      vectors of a token, neighbours among its P numbers
    past                       clean tokens before, which the network reads
    mlp_width, depth, heads    of the small transformer; its feed-forward networks are 4 times as wide
    init                       of the linear layers that do not begin at 0

    Loss, sampler and their options: `TokenDiffusion`. Raises ValueError for sizes that do not divide, and as that does.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        parts: int,
        past: int = 1,
        mlp_width: int = 1024,
        depth: int = 4,
        heads: int = 16,
        draws: int = 1,
        steps: int = 10,
        schedule: Schedule = GVP(),
        parameterization: str = "velocity",
        timesteps: TimestepSampler = Stratified(),
        sampler: str = "ddim",
        spacing: str = "uniform",
        tau: float = 1.0,
        noise_scale: float = 1.0,
        drop: float = 0.0,
        guidance: float = 1.0,
        init: str | float = "xavier_uniform",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(
            spec=spec, outputs=outputs, draws=draws, steps=steps, schedule=schedule, parameterization=parameterization,
            timesteps=timesteps, sampler=sampler, spacing=spacing, tau=tau, noise_scale=noise_scale, drop=drop,
            guidance=guidance,
        )  # fmt: skip
        check_counts(past=past, mlp_width=mlp_width, depth=depth, heads=heads)
        self.past = past
        args = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.time = TimestepEmbedder(mlp_width, **args)
        self.state = linear(width, mlp_width, init=init, **args)
        self.noisy = Parts(spec.features, parts, mlp_width, "head", init=init, **args)
        self.clean = Parts(spec.features, parts, mlp_width, "head", init=init, **args)
        self.local = LocalTransformer(mlp_width, depth, heads, timed=True, init=init, dtype=dtype, rngs=rngs)
        self.norm = LayerNorm(mlp_width, dtype=dtype)
        self.adaln = linear(mlp_width, 2 * mlp_width, init=0.0, **args)
        self.last = last_linear(mlp_width, outputs // parts, init=0.0, **args)

    def context(
        self, hidden: Float[Array, "B M D"], past: Float[Array, "B M K P"]
    ) -> tuple[Float[Array, "B M W"], Float[Array, "B M K P"]]:
        """The state, projected, and the tokens before."""
        return self.state(hidden), past

    def network(
        self, xt: Float[Array, "B M P"], t: Float[Array, "#B #M"], context: tuple[Array, Array]
    ) -> Float[Array, "B M P"]:
        """f of the noisy vectors, in f32 (docstring of the module)."""
        rows = xt.shape[0] * xt.shape[1]
        state, past = context
        value, time = self.process.network(xt, t)
        vector = self.time(jnp.broadcast_to(time, xt.shape[:2]).reshape(rows, 1))
        clean = self.clean(past.reshape(rows * self.past, -1)).reshape(rows, self.past * self.clean.count, -1)
        noisy = self.noisy(value.reshape(rows, -1))
        x = self.local(jnp.concatenate([state.reshape(rows, 1, -1), clean, noisy], axis=1), vector)
        shift, scale = jnp.split(self.adaln(jax.nn.silu(vector)), 2, axis=-1)
        return self.last(self.norm(x[:, -self.noisy.count :]) * (1 + scale) + shift).reshape(xt.shape)
