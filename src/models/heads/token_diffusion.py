"""A small diffusion model of ONE token's vector, given the hidden state that predicts it: a network of its own.

f: time and state are added to one vector y; blocks x + gate · MLP(norm(x) · (1 + scale) + shift), whose shift, scale
and gate are linear in SiLU(y) and begin at 0; a modulated norm and a linear layer that begins at 0. Loss and samples:
`_token_diffusion.py`.

Sources: Li et al. 2024 "MAR" (arXiv 2406.11838; norm=affine), Sun et al. 2024 "LatentLM" (arXiv 2412.08635; norm=rms,
mlp=swiglu, bias=False), Peebles & Xie 2023 (adaLN-zero).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.corruption.schedules import Linear, Schedule
from src.corruption.timesteps import Stratified, TimestepSampler
from src.interfaces import FieldSpec
from src.models.conditioning import TimestepEmbedder
from src.models.heads._last import last_linear
from src.models.heads._token_diffusion import TokenDiffusion, check_counts
from src.models.layers import LayerNorm, SwiGLU, linear

_RMS = functools.partial(nnx.RMSNorm, epsilon=1e-6, use_scale=False)
NORMS = {  # of the blocks, and of the end
    "layer": (LayerNorm, LayerNorm),
    "affine": (functools.partial(nnx.LayerNorm, epsilon=1e-6), LayerNorm),
    "rms": (_RMS, _RMS),
}
MLPS = ("silu", "swiglu")


class TokenDiffusionHead(TokenDiffusion):
    """The head of fields without a process whose tokens are vectors, for `next_token` and `left_to_right`.

    mlp_width, depth   of the small network
    norm               layer; affine: with learned scale and shift in the blocks (MAR); rms: of LatentLM, without
    mlp                silu: linear, SiLU, linear; swiglu: down(silu(gate x) · up x)
    inner              width inside a block's MLP; 0: mlp_width
    bias               of all linear layers
    init               of the linear layers that do not begin at 0

    Loss, sampler and their options: `TokenDiffusion`. Raises ValueError for an unknown norm or mlp, and as that does.
    """

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        mlp_width: int = 1024,
        depth: int = 3,
        norm: str = "layer",
        mlp: str = "silu",
        inner: int = 0,
        bias: bool = True,
        draws: int = 4,
        steps: int = 16,
        schedule: Schedule = Linear(),
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
        check_counts(mlp_width=mlp_width, depth=depth)
        for option, value, known in (("norm", norm, NORMS), ("mlp", mlp, MLPS)):
            if value not in known:
                raise ValueError(f"head.{option}={value!r} is unknown; use one of {', '.join(known)}")
        self.depth = depth
        args = {"bias": bias, "dtype": dtype, "rngs": rngs}
        inside, end = NORMS[norm]
        self.time = TimestepEmbedder(mlp_width, **args)
        self.state = linear(width, mlp_width, init=init, **args)
        self.first = linear(spec.features, mlp_width, init=init, **args)
        for index in range(depth):
            setattr(self, f"block_{index}", _Block(mlp_width, inner or mlp_width, mlp, inside, init=init, **args))
        self.norm = end(mlp_width, dtype=dtype, rngs=rngs)
        self.adaln = linear(mlp_width, 2 * mlp_width, init=0.0, **args)
        self.last = last_linear(mlp_width, outputs, init=0.0, **args)

    def context(self, hidden: Float[Array, "B M D"], past: None = None) -> Float[Array, "B M W"]:
        """The state, projected."""
        return self.state(hidden)

    def network(
        self, xt: Float[Array, "B M P"], t: Float[Array, "#B #M"], context: Float[Array, "B M W"]
    ) -> Float[Array, "B M P"]:
        """f of the noisy vectors, in f32 (docstring of the module)."""
        value, time = self.process.network(xt, t)
        y = jax.nn.silu(self.time(time) + context)
        x = self.first(value)
        for index in range(self.depth):
            x = getattr(self, f"block_{index}")(x, y)
        shift, scale = jnp.split(self.adaln(y), 2, axis=-1)
        return self.last(self.norm(x) * (1 + scale) + shift)


class _Block(nnx.Module):
    """x + gate · MLP(norm(x) · (1 + scale) + shift); gate, shift and scale begin at 0."""

    def __init__(self, width: int, inner: int, mlp: str, norm, *, init: str | float, bias: bool, dtype, rngs: nnx.Rngs):
        args = {"bias": bias, "dtype": dtype, "rngs": rngs}
        self.norm = norm(width, dtype=dtype, rngs=rngs)
        self.adaln = linear(width, 3 * width, init=0.0, **args)
        self.swiglu = SwiGLU(width, inner, init=init, **args) if mlp == "swiglu" else None
        if self.swiglu is None:
            self.up = linear(width, inner, init=init, **args)
            self.down = linear(inner, width, init=init, **args)

    def __call__(self, x: Float[Array, "B M W"], y: Float[Array, "B M W"]) -> Float[Array, "B M W"]:
        shift, scale, gate = jnp.split(self.adaln(y), 3, axis=-1)
        x, given = self.norm(x) * (1 + scale) + shift, x
        return given + gate * (self.down(jax.nn.silu(self.up(x))) if self.swiglu is None else self.swiglu(x))
