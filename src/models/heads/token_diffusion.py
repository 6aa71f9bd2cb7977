"""A small diffusion model of ONE token's vector, given the hidden state that predicts it: causal rows of vectors.

1. The state z of the transformer conditions a small network f(x_t, t, z) of one vector x in R^P, which is trained by
       E_{t, eps} |f(x_t, t, z) - target(x, eps, t)|² / P
   on `draws` pairs of time and noise for each token, for one pass of the transformer.
2. A next token is a sample: from noise, `steps` reverse steps of f, with z fixed. The transformer is not run again.
3. f: time and state are added to one vector y; blocks x + gate · MLP(norm(x) · (1 + scale) + shift), whose shift, scale
   and gate are linear in SiLU(y) and begin at 0; a modulated norm and a linear layer that begins at 0.

Sources: Li et al. 2024 "MAR" (arXiv 2406.11838, section 3.2 and appendix A; network and draws: 3, 1), Sun et al. 2024
"LatentLM" (arXiv 2412.08635, section 2.1: causal rows), Peebles & Xie 2023 (adaLN-zero).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from src.common.rng import stream
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Linear, Schedule
from src.corruption.timesteps import Stratified, TimestepSampler
from src.interfaces import FieldSpec, Guide
from src.models.conditioning import TimestepEmbedder
from src.models.heads._last import last_linear
from src.models.layers import LayerNorm, linear

SAMPLERS = ("ddim", "ancestral")


class _Draws(NamedTuple):
    """Times and noise of all draws; those of one token are neighbours, M = N · draws."""

    t: Float[Array, "B M"]
    noise: Float[Array, "B M P"]


class TokenDiffusionHead(nnx.Module):
    """The head of fields without a process whose tokens are vectors, for `next_token` and `left_to_right`.

    mlp_width, depth   of the small network
    draws              times and noises of each token and step of training (MAR: 4)
    steps              reverse steps of a sample
    schedule           of the noise, a class of `corruption/schedules.py`
    parameterization   of the network's output: eps, x0, v, velocity
    timesteps          sampler of the training times, a class of `corruption/timesteps.py`
    sampler            ddim: deterministic after the first noise (Euler's method on a linear schedule); ancestral: draws
                       of the posterior
    temperature        factor of the noise: of the first one (ddim), or of that of every step (ancestral, as MAR)
    init               of the linear layers that do not begin at 0

    Raises ValueError for tokens that are not vectors, numbers below 1, an unknown sampler, a negative temperature, and
    what the process refuses.
    """

    PARTS: ClassVar[dict[str, str]] = {"schedule": "corruption", "timesteps": "corruption"}
    SAMPLING: ClassVar[tuple[str, ...]] = ("steps", "sampler", "temperature")

    def __init__(
        self,
        *,
        width: int,
        spec: FieldSpec,
        outputs: int,
        mlp_width: int = 1024,
        depth: int = 3,
        draws: int = 4,
        steps: int = 16,
        schedule: Schedule = Linear(),
        parameterization: str = "velocity",
        timesteps: TimestepSampler = Stratified(),
        sampler: str = "ddim",
        temperature: float = 1.0,
        init: str | float = "xavier_uniform",
        dtype=jnp.float32,
        rngs: nnx.Rngs,
    ):
        if spec.features is None or spec.vocab is not None or outputs != spec.features:
            raise ValueError(f"head.name=token_diffusion makes vectors of fields without a process, not {spec}")
        for name, value in (("mlp_width", mlp_width), ("depth", depth), ("draws", draws), ("steps", steps)):
            if value < 1:
                raise ValueError(f"head.{name}={value} must be at least 1")
        if sampler not in SAMPLERS:
            raise ValueError(f"head.sampler={sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
        if temperature < 0:
            raise ValueError(f"head.temperature={temperature} must not be negative")
        self.depth, self.draws, self.steps, self.timesteps = depth, draws, steps, timesteps
        self.sampler, self.temperature = sampler, temperature
        self.process = Gaussian(field=spec, schedule=schedule, parameterization=parameterization)
        args = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.time = TimestepEmbedder(mlp_width, dtype=dtype, rngs=rngs)
        self.state = linear(width, mlp_width, init=init, **args)
        self.first = linear(spec.features, mlp_width, init=init, **args)
        for index in range(depth):
            setattr(self, f"block_{index}", _Block(mlp_width, init=init, dtype=dtype, rngs=rngs))
        self.norm = LayerNorm(mlp_width, dtype=dtype)
        self.adaln = linear(mlp_width, 2 * mlp_width, init=0.0, **args)
        self.last = last_linear(mlp_width, outputs, init=0.0, **args)

    def __call__(self, hidden: Array, cond: Array | None = None) -> NoReturn:
        """There is nothing for a process outside. Raises ValueError."""
        raise ValueError(
            "head.name=token_diffusion has a process of its own: remove the field's process and use the objective "
            "next_token and the decoder left_to_right, or take another head"
        )

    def noise(self, key: Array, shape: tuple[int, int]) -> _Draws:
        """Times and noise of all draws of [B, N] tokens."""
        time_key, noise_key = jax.random.split(key)
        shape = shape[0], shape[1] * self.draws
        return _Draws(self.timesteps(time_key, shape), self.process.noise(noise_key, shape))

    def nll(self, hidden: Float[Array, "B N D"], target: Float[Array, "B N P"], noise: _Draws) -> Float[Array, "B N"]:
        """The mean squared error of the network's output, over draws and features: what stands for -log p."""
        x0 = jnp.repeat(target.astype(jnp.float32), self.draws, axis=1)
        c = self.process.corrupt(x0, noise.noise, noise.t)
        state = jnp.repeat(self.state(hidden), self.draws, axis=1)
        wanted = self.process.targets(c)[self.process.parameterization]
        error = ((self.network(c.xt, c.t, state) - wanted) ** 2).mean(-1)
        return error.reshape(*hidden.shape[:2], self.draws).mean(-1)

    def sample(
        self, key: Array, hidden: Float[Array, "B D"], guide: Guide, choose: Callable[[Array, Array], Array]
    ) -> Float[Array, "rows P"]:
        """The next vector of each row that `guide` leaves; `choose` is not used.

        The states that guide one row share all noise, and the point at which the network is evaluated.
        """
        state = self.state(hidden)[:, None]
        output = jax.ShapeDtypeStruct((hidden.shape[0], 1, self.process.outputs), jnp.float32)
        rows = jax.eval_shape(guide, output, jax.ShapeDtypeStruct((), jnp.float32)).shape[0]
        times = self.process.times(self.steps)
        x = self.process.prior(stream(key, "prior"), (rows, 1))
        x = x * self.temperature if self.sampler == "ddim" else x

        def body(x: Array, now: tuple[Array, Array, Array]) -> tuple[Array, None]:
            index, t, s = now
            output = self.network(jnp.repeat(x, hidden.shape[0] // rows, axis=0), t[None, None], state)
            return self._step(stream(key, "step", index), guide(output, t), x, t, s), None

        return jax.lax.scan(body, x, (jnp.arange(self.steps), times[:-1], times[1:]))[0][:, 0]

    def network(
        self, xt: Float[Array, "B M P"], t: Float[Array, "#B #M"], state: Float[Array, "B M W"]
    ) -> Float[Array, "B M P"]:
        """f of the noisy vectors, in f32 (docstring of the module, 3)."""
        value, time = self.process.network(xt, t)
        y = jax.nn.silu(self.time(time) + state)
        x = self.first(value)
        for index in range(self.depth):
            x = getattr(self, f"block_{index}")(x, y)
        shift, scale = jnp.split(self.adaln(y), 2, axis=-1)
        return self.last(self.norm(x) * (1 + scale) + shift)

    def _step(self, key: Array, output: Array, xt: Array, t: Array, s: Array) -> Array:
        """x_s from x_t, [rows, 1, P]."""
        estimate = self.process.estimate(output, xt, t)
        if self.sampler == "ddim":
            return self.process.schedule.alpha(s) * estimate.x0 + self.process.schedule.sigma(s) * estimate.eps
        mean, log_variance = self.process.posterior_moments(xt, estimate, t, s)
        noise = self.temperature * jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return mean + jnp.where(s > 0, noise, 0.0)


class _Block(nnx.Module):
    """x + gate · MLP(norm(x) · (1 + scale) + shift); gate, shift and scale begin at 0."""

    def __init__(self, width: int, *, init: str | float, dtype, rngs: nnx.Rngs):
        args = {"bias": True, "dtype": dtype, "rngs": rngs}
        self.norm = LayerNorm(width, dtype=dtype)
        self.adaln = linear(width, 3 * width, init=0.0, **args)
        self.up, self.down = (linear(width, width, init=init, **args) for _ in range(2))

    def __call__(self, x: Float[Array, "B M W"], y: Float[Array, "B M W"]) -> Float[Array, "B M W"]:
        shift, scale, gate = jnp.split(self.adaln(y), 3, axis=-1)
        return x + gate * self.down(jax.nn.silu(self.up(self.norm(x) * (1 + scale) + shift)))
