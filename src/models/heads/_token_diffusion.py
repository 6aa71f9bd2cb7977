"""What heads share that diffuse one token's vector, given the hidden state that predicts it.

1. The state h of the transformer conditions a small network f(x_t, t, h) of one vector x in R^P, which is trained by
       E_{t, eps} |f(x_t, t, h) - target(x, eps, t)|² / P
   on `draws` pairs of time and noise for each token, for one pass of the transformer.
2. A next token is a sample: from noise, `steps` reverse steps of f, with h fixed. The transformer is not run again.
3. Guidance in the head: f(x_t, t, 0) + guidance (f(x_t, t, h) - f(x_t, t, 0)). The transformer runs once for both; in
   training a share `drop` of the states is replaced by 0. DiTAR's w is guidance - 1.
4. tau, the time at which noise enters the ODE: from x = 0 at the first time, without noise, to x_tau; then
       x_tau <- alpha_tau x0(x_tau, tau) + sigma_tau eps,
   and on to t = 0. tau = 1 is sampling from noise, tau = 0 has no noise at all. A grid without tau gets it as a further
   time, and the network is evaluated twice there.
5. Noise scale: the factor of all noise of a sample, of that which enters an ODE and of that of every ancestral step but
   not of what the ancestral steps begin with.

Sources: Li et al. 2024 "MAR" (arXiv 2406.11838, section 3.2 and appendix A: 1, 2, 5), Sun et al. 2024 "LatentLM" (arXiv
2412.08635, section 2.1: causal rows, DPM-Solver), Jia et al. 2025 "DiTAR" (arXiv 2502.03930: 3, 4).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from src.common.rng import stream
from src.corruption._grids import time_grid
from src.corruption._parameterizations import Estimate
from src.corruption._solvers import History, ddim, dpm_solver_2m, no_history
from src.corruption.gaussian import Gaussian
from src.corruption.schedules import Schedule
from src.corruption.timesteps import TimestepSampler
from src.interfaces import FieldSpec, Guide, PyTree

SAMPLERS = ("ddim", "dpm", "ancestral")


class _Draws(NamedTuple):
    """Times and noise of all draws; those of one token are neighbours, M = N · draws. `kept`: the states that are not
    dropped, None where none ever is."""

    t: Float[Array, "B M"]
    noise: Float[Array, "B M P"]
    kept: Bool[Array, "B N"] | None = None


class TokenDiffusion(nnx.Module):
    """Loss and samples; a subclass has the network, `context` and `network`.

    draws              times and noises of each token and step of training (MAR and LatentLM: 4)
    steps              reverse steps of a sample
    schedule           of the noise, a class of `corruption/schedules.py`
    parameterization   of the network's output: eps, x0, v, velocity
    timesteps          sampler of the training times, a class of `corruption/timesteps.py`
    sampler            ddim: deterministic after the noise (Euler's method on a linear schedule); dpm: DPM-Solver++(2M),
                       too, of second order; ancestral: draws of the posterior
    spacing            of the kept indices of a discrete schedule: uniform, ddim or linspace
    tau                time at which noise enters (docstring of the module, 4), of ddim and dpm
    noise_scale        factor of the noise (5)
    drop               share of the states that are 0 in training
    guidance           scale of the guidance in the head (3); 1: none

    Raises ValueError for tokens that are not vectors, numbers below 1, an unknown sampler or spacing, a negative noise
    scale, tau or drop out of range, guidance of a head that saw no state dropped, and what the process refuses.
    """

    PARTS: ClassVar[dict[str, str]] = {"schedule": "corruption", "timesteps": "corruption"}
    SAMPLING: ClassVar[tuple[str, ...]] = ("steps", "sampler", "spacing", "tau", "noise_scale", "guidance")
    past: ClassVar[int] = 0  # tokens of the field before the one that is made, which the network reads

    def __init__(
        self,
        *,
        spec: FieldSpec,
        outputs: int,
        draws: int,
        steps: int,
        schedule: Schedule,
        parameterization: str,
        timesteps: TimestepSampler,
        sampler: str,
        spacing: str,
        tau: float,
        noise_scale: float,
        drop: float,
        guidance: float,
    ):
        if spec.features is None or spec.vocab is not None or outputs != spec.features:
            raise ValueError(f"{self._named} makes vectors of fields without a process, not {spec}")
        check_counts(draws=draws, steps=steps)
        if sampler not in SAMPLERS:
            raise ValueError(f"head.sampler={sampler!r} is unknown; use one of {', '.join(SAMPLERS)}")
        if noise_scale < 0:
            raise ValueError(f"head.noise_scale={noise_scale} must not be negative")
        if not 0 <= tau <= 1 or (tau < 1 and sampler == "ancestral"):
            raise ValueError(f"head.tau={tau} with sampler={sampler!r}; use a time in [0, 1] with ddim or dpm")
        if not 0 <= drop < 1:
            raise ValueError(f"head.drop={drop}; give a share of at least 0 and below 1")
        if guidance != 1 and drop == 0:
            raise ValueError(f"head.guidance={guidance} needs states that were dropped in training: set head.drop")
        time_grid(schedule, steps, spacing=spacing)  # refuses what does not fit
        self.draws, self.steps, self.timesteps, self.sampler, self.spacing = draws, steps, timesteps, sampler, spacing
        self.tau, self.noise_scale, self.drop, self.guidance = tau, noise_scale, drop, guidance
        self.process = Gaussian(field=spec, schedule=schedule, parameterization=parameterization)

    def context(self, hidden: Float[Array, "B M D"], past: Float[Array, "B M K P"] | None) -> PyTree:
        """What f reads of the state and of the K clean tokens before; leaves [B, M, …]."""
        raise NotImplementedError

    def network(self, xt: Float[Array, "B M P"], t: Float[Array, "#B #M"], context: PyTree) -> Float[Array, "B M P"]:
        """f of the noisy vectors, in f32."""
        raise NotImplementedError

    def __call__(self, hidden: Array, cond: Array | None = None) -> NoReturn:
        """There is nothing for a process outside. Raises ValueError."""
        raise ValueError(
            f"{self._named} has a process of its own: remove the field's process and use the objective "
            "next_token and the decoder left_to_right, or take another head"
        )

    def noise(self, key: Array, shape: tuple[int, int]) -> _Draws:
        """Times and noise of all draws of [B, N] tokens, and which of their states are kept."""
        time_key, noise_key = jax.random.split(key)
        kept = None
        if self.drop:
            noise_key, drop_key = jax.random.split(noise_key)
            kept = jax.random.bernoulli(drop_key, 1 - self.drop, shape)
        shape = shape[0], shape[1] * self.draws
        return _Draws(self.timesteps(time_key, shape), self.process.noise(noise_key, shape), kept)

    def nll(self, hidden: Float[Array, "B N D"], target: Float[Array, "B N P"], noise: _Draws) -> Float[Array, "B N"]:
        """The mean squared error of the network's output, over draws and features: what stands for -log p."""
        target = target.astype(jnp.float32)
        c = self.process.corrupt(self._repeated(target), noise.noise, noise.t)
        hidden = hidden if noise.kept is None else jnp.where(noise.kept[..., None], hidden, 0)
        context = self.context(hidden, before(target, self.past) if self.past else None)
        wanted = self.process.targets(c)[self.process.parameterization]
        error = ((self.network(c.xt, c.t, jax.tree.map(self._repeated, context)) - wanted) ** 2).mean(-1)
        return error.reshape(*hidden.shape[:2], self.draws).mean(-1)

    def sample(
        self,
        key: Array,
        hidden: Float[Array, "B D"],
        guide: Guide,
        choose: Callable[[Array, Array], Array],
        past: Float[Array, "B K P"] | None = None,
    ) -> Float[Array, "rows P"]:
        """The next vector of each row that `guide` leaves; `choose` is not used.

        past   the K clean tokens of the field before it, 0 where there is none

        The states that guide one row share all noise, and the point at which the network is evaluated.
        """
        output = jax.ShapeDtypeStruct((hidden.shape[0], 1, self.process.outputs), jnp.float32)
        rows = jax.eval_shape(guide, output, jax.ShapeDtypeStruct((), jnp.float32)).shape[0]
        f = self._guided(hidden, past, guide, hidden.shape[0] // rows)
        noise = self.process.prior(stream(key, "prior"), (rows, 1))
        noise = noise if self.sampler == "ancestral" else noise * self.noise_scale
        with jax.ensure_compile_time_eval():
            times = np.asarray(time_grid(self.process.schedule, self.steps, spacing=self.spacing))
        tau, schedule = np.float32(self.tau), self.process.schedule
        if tau >= times[0]:
            return self._solve(key, f, noise, times)[:, 0]
        x = self._solve(key, f, jnp.zeros_like(noise), np.append(times[times > tau], tau))
        if tau == 0:
            return x[:, 0]
        x = schedule.alpha(tau) * f(x, jnp.asarray(tau)).x0 + schedule.sigma(tau) * noise
        return self._solve(key, f, x, np.append(tau, times[times < tau]))[:, 0]

    def _guided(self, hidden: Array, past: Array | None, guide: Guide, repeats: int) -> Callable[..., Estimate]:
        """(x_t [rows, 1, P], scalar t) -> the estimate of the guided outputs; of given states, then of dropped ones."""
        twice = (lambda a: jnp.concatenate([a, a])) if self.guidance != 1 else (lambda a: a)
        states = hidden if self.guidance == 1 else jnp.concatenate([hidden, jnp.zeros_like(hidden)])
        context = self.context(states[:, None], None if past is None else twice(past)[:, None])

        def estimate(x: Array, t: Array) -> Estimate:
            output = self.network(twice(jnp.repeat(x, repeats, axis=0)), t[None, None], context)
            if self.guidance != 1:
                given, dropped = jnp.split(output, 2)
                output = dropped + self.guidance * (given - dropped)
            return self.process.estimate(guide(output, t), x, t)

        return estimate

    def _solve(self, key: Array, f: Callable[..., Estimate], x: Float[Array, "rows 1 P"], times: np.ndarray) -> Array:
        """x at the last of some times, from x at the first."""

        def body(carry: PyTree, now: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
            x, history = carry
            index, t, s = now
            return self._step(stream(key, "step", index), f(x, t), x, t, s, history), None

        now = jnp.arange(len(times) - 1), jnp.asarray(times[:-1]), jnp.asarray(times[1:])
        return jax.lax.scan(body, (x, no_history(x)), now)[0][0]

    def _step(self, key: Array, estimate: Estimate, xt: Array, t: Array, s: Array, history: History) -> PyTree:
        """x_s from x_t, [rows, 1, P], and the history of the next step."""
        if self.sampler == "dpm":
            return dpm_solver_2m(self.process.schedule, estimate.x0, xt, t, s, history)
        if self.sampler == "ddim":
            return ddim(self.process.schedule, estimate, xt, s), history
        mean, log_variance = self.process.posterior_moments(xt, estimate, t, s)
        noise = self.noise_scale * jnp.exp(0.5 * log_variance) * jax.random.normal(key, mean.shape)
        return mean + jnp.where(s > 0, noise, 0.0), history

    def _repeated(self, a: Array) -> Array:
        """[B, N, …] once for each draw."""
        return jnp.repeat(a, self.draws, axis=1)

    @property
    def _named(self) -> str:
        return f"head.name={type(self).__module__.rpartition('.')[-1]}"


def before(tokens: Float[Array, "B N P"], count: int) -> Float[Array, "B N K P"]:
    """The `count` tokens before each, the oldest first; 0 where there is none."""
    length = tokens.shape[1]
    padded = jnp.pad(tokens, ((0, 0), (count, 0), (0, 0)))
    return jnp.stack([padded[:, k : k + length] for k in range(count)], axis=2)


def check_counts(**counts: int) -> None:
    """Raises ValueError for an option below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"head.{name}={value} must be at least 1")
