"""Exact posteriors for denoisers: with p(x_0 | x_t) known, a sampler's only error is that of its finite steps.

A law on few states stands for the data. An oracle gives the estimate that the best network would give, and the total
variation between the law and samples.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from src.corruption.base import expand
from src.interfaces import Corrupted

SAMPLES = 8_000


def rows(size, length):
    """[size ** length, length]: all rows of that many numbers below size, in order."""
    return np.stack(np.meshgrid(*[np.arange(size)] * length, indexing="ij"), axis=-1).reshape(-1, length)


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A process and the number of a law; the states are all rows of tokens, or the points of `points`."""

    process: object
    law: int = 0

    def probabilities(self):
        """[S] of the states: an uneven law in which tokens depend on each other."""
        return np.random.default_rng(self.law).dirichlet(np.full(len(self.states()), 0.4))

    def weights(self, likelihood):
        """p(state | x_t) [B, S] from log q(x_t | state)."""
        return jax.nn.softmax(likelihood + jnp.log(self.probabilities()), axis=-1)


class CategoricalOracle(Oracle):
    """Rows of 3 tokens of 3 symbols."""

    def states(self):
        return rows(3, 3)

    def estimate(self, xt, t):
        """Each sample has that of its row: there are few different rows of one time."""
        size = self.process.ids
        return self.exact(jnp.asarray(rows(size, 3)), t)[xt @ np.array([size**2, size, 1])]

    def exact(self, xt, t):
        given = jnp.maximum(self.process.likelihood(xt, expand(t, xt)), 1e-37)  # [B, 3 tokens, x_0]
        logs = jnp.log(given)[:, np.arange(3), self.states()]
        weights = self.weights(logs.sum(axis=-1))
        p = jnp.einsum("bs,snv->bnv", weights, jax.nn.one_hot(self.states(), 3))
        return self.process.estimate(jnp.log(jnp.maximum(p, 1e-37)), xt, t)

    def prior(self, key, samples):
        return self.process.prior(key, (samples, 3))

    def index(self, x0):
        return x0 @ np.array([9, 3, 1])


class CountsOracle(Oracle):
    """One token of two counts below 6."""

    def states(self):
        return rows(6, 2)

    def estimate(self, xt, t):
        return self.exact(jnp.asarray(rows(6, 2))[:, None], t)[self.index(xt)]

    def exact(self, xt, t):
        kept, lost = self.process.keep_probability(t)
        pmf = np.array([[math.comb(n, k) for k in range(6)] for n in range(6)])
        k, gone = np.arange(6), np.maximum(np.arange(6)[:, None] - np.arange(6), 0)
        logs = jnp.log(jnp.maximum(pmf * kept**k * lost**gone, 1e-37))  # [x_0, x_t]
        first, second = jnp.moveaxis(logs.T[xt[:, 0]], 1, 0)  # [B, x_0] each
        weights = self.weights((first[:, :, None] + second[:, None]).reshape(len(xt), -1))
        gone = self.states() - xt
        rate = jnp.maximum(jnp.einsum("bs,bsp->bp", weights, gone)[:, None], 1e-6)
        return self.process.estimate(rate + jnp.log(-jnp.expm1(-rate)), xt, t)

    def prior(self, key, samples):
        return self.process.prior(key, (samples, 1))

    def index(self, x0):
        return x0[:, 0] @ np.array([6, 1])


class GaussianOracle(Oracle):
    """One token, one of five points in the plane; samples are told by the point next to them."""

    def states(self):
        return np.array([[1.0, 0.0], [0.0, 1.2], [-1.0, 0.3], [0.4, -1.0], [-0.8, -0.9]], np.float32)

    def estimate(self, xt, t):
        time = expand(t, xt)
        a, s = self.process.schedule.alpha(time), self.process.schedule.sigma(time)
        gap = (xt - a * self.states()) / jnp.maximum(s, 1e-6)
        weights = self.weights(-0.5 * (gap**2).sum(axis=-1))
        x0 = (weights @ self.states())[:, None]
        eps = (xt - a * x0) / jnp.maximum(s, 1e-6)
        targets = self.process.targets(Corrupted(x0=x0, xt=xt, t=t, noise=eps))
        return self.process.estimate(targets[self.process.parameterization], xt, t)

    def prior(self, key, samples):
        return self.process.prior(key, (samples, 1))

    def index(self, x0):
        return jnp.argmin(((x0 - self.states()) ** 2).sum(axis=-1), axis=-1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _step(oracle, sampler, key, i, x, t, s, state):
    """One step; the steps of all runs share one program."""
    return sampler.step(
        oracle.process, jax.random.fold_in(key, i), oracle.estimate(x, t), x, t, s, state, oracle.estimate
    )


def total_variation(oracle, sampler, steps, samples=SAMPLES):
    """Half the sum of the differences between the shares of samples and the law."""
    start, key = jax.random.split(jax.random.key(steps))
    x = oracle.prior(start, samples)
    times, state = np.asarray(sampler.times(oracle.process, steps)), sampler.init(oracle.process, x)
    for i in range(steps):
        x, state = _step(oracle, sampler, key, i, x, times[i], times[i + 1], state)
    shares = np.bincount(oracle.index(oracle.process.clean(x)), minlength=len(oracle.states())) / samples
    return 0.5 * np.abs(shares - oracle.probabilities()).sum()


def floor(oracle, samples=SAMPLES):
    """The mean total variation of as many samples of the law itself."""
    p = oracle.probabilities()
    return 0.5 * np.sqrt(2 * p * (1 - p) / (np.pi * samples)).sum()
