"""Diffusion loss of one name, or of several that share tokens and times."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from src.common.rng import stream
from src.interfaces import Corrupted, Field, Hidden, Loss, LossTerm, Net, PyTree, View, row_of

QUARTERS = 4  # of diffusion time, with losses logged separately
PERS = ("row", "block", "token")
STATISTICS = "@statistics"  # suffix of the terms for adaptive processes, which are not logged
BINS = 32  # of diffusion time in these terms


class Diffusion:
    """Adds noise to the tokens of `names`, and sums a loss of the heads' outputs over the targets.

    loss        of all names, or by name (`objectives/losses`)
    timesteps   (key, shape) -> process times (`corruption/timesteps.py`)
    per         draw one time for each `row` (in packed rows, each part), `block` of the noisy copy (in packed rows,
                each block of each example), or `token`
    given       some tokens of the names may be given: these keep time 0 and get no noise; every token has a time
    first_weight  factor of the loss of the tokens of a row's first block; that of a later block is nearer to 1, along a
                line, by the place where it begins (CausalFusion: 2)
    hint        probability that a row reads its own first estimate (self-conditioning, Chen et al. 2022, arXiv
                2208.04202); it needs a second pass of the trunk, without gradient
    """

    PARTS: ClassVar[dict[str, str]] = {"loss": "objectives/losses", "timesteps": "corruption"}
    adds_noise = True  # to its names

    def __init__(
        self,
        names: Sequence[str] | str,
        loss: Loss | Mapping[str, Loss],
        timesteps: Callable[[Array, tuple[int, ...]], Array],
        *,
        per: str = "row",
        given: bool = False,
        first_weight: float = 1.0,
        hint: float = 0.0,
    ):
        if per not in PERS:
            raise ValueError(f"per={per!r} is unknown; use one of {', '.join(PERS)}")
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self.losses = dict(loss) if isinstance(loss, Mapping) else dict.fromkeys(self.names, loss)
        if missing := [name for name in self.names if name not in self.losses]:
            raise ValueError(f"loss lacks {missing[0]!r}; give one for each of {', '.join(self.names)}")
        self.timesteps, self.per, self.given, self.hint = timesteps, per, given, hint
        self.first_weight = first_weight

    def draw(self, key: Array, fields: Mapping[str, Field], view: View) -> PyTree:
        """Times and noise of the whole batch."""
        time_key, noise_key = jax.random.split(key)
        first = view.batch.tokens[self.names[0]]
        outer, length = first.valid.shape[:-1], first.valid.shape[-1]
        rows = math.prod(outer)
        block = view.layout.block_of(view.batch, self.names[0]) if self.per == "block" else np.zeros(1, np.int32)
        blocks = int(block.max()) + 1 if isinstance(block, np.ndarray) else length  # as many as there may be
        times = self.timesteps(time_key, (rows, length if self.per == "token" else blocks))
        if self.per == "block":
            times = jnp.take_along_axis(times, jnp.broadcast_to(block, (rows, length)), axis=1)
        noise = {}
        for number, name in enumerate(self.names):  # the first name uses the key itself
            own = noise_key if number == 0 else stream(noise_key, name)
            noise[name] = fields[row_of(name)].process.noise(own, (rows, length))
        draws = {"times": times, "noise": noise}
        if self.hint:
            draws["hinted"] = jax.random.uniform(stream(key, "hint"), (rows,)) < self.hint
        return jax.tree.map(lambda a: a.reshape(*outer, *a.shape[1:]), draws)

    def prepare(self, net: Net, view: View, draws: PyTree) -> tuple[View, dict[str, Corrupted]]:
        """Adds the noise, and with `hint` the network's first estimate."""
        aux = {}
        for name in self.names:
            bound, tokens = net.field(name), view.batch.tokens[name]
            outer = tokens.valid.shape[:-1]
            x0, noise, times = _fold((bound.encode(tokens.value), draws["noise"][name], draws["times"]), len(outer))
            if self.given:
                times = jnp.where(tokens.target.reshape(times.shape[0], -1), times, 0)
            c = aux[name] = bound.process.corrupt(x0, noise, times)
            value, time = bound.process.network(c.xt, c.t)
            value = value.reshape(*outer, *value.shape[1:])
            view = view.replace(noisy=view.noisy | {name: value}, times=view.times | {name: time.reshape(outer[0], -1)})
        return (self._hinted(net, view, aux, draws["hinted"]) if self.hint else view), aux

    def _hinted(self, net: Net, view: View, aux: dict[str, Corrupted], hinted: Bool[Array, "*B"]) -> View:
        """The view with the network's first estimates, and zeros in the other rows."""
        hidden, hints = net.hidden({"": view})[""], {}
        for name in self.names:
            process = net.field(name).process
            hint = process.hint(process.estimate(self._output(net, hidden, name), aux[name].xt, aux[name].t))
            shown = hinted.reshape(-1, *[1] * (hint.ndim - 1))
            hint = jax.lax.stop_gradient(jnp.where(shown, hint, 0))
            hints[name] = hint.reshape(*hinted.shape, *hint.shape[1:])
        return view.replace(hints=view.hints | hints)

    def _output(self, net: Net, hidden: Hidden, name: str) -> Array:
        """The head's output for the noisy tokens, [rows or parts, N, outputs]."""
        outer = hidden.view.batch.tokens[name].valid.ndim - 1
        states, vector = hidden.of(name), hidden.vectors.get(name)
        if vector is not None and outer > 1:
            vector = vector.reshape(-1, 1, vector.shape[-1])
        return net.field(name)(_fold(states, outer), vector)

    def loss(self, net: Net, hidden: Hidden, aux: dict[str, Corrupted]) -> dict[str, LossTerm]:
        """Losses by name of the loss (of several names, `name/loss`), and their number of targets.

        `mse@0.00-0.25` … are the parts of the first loss from tokens with times in that range; they add up to it.
        """
        terms = {}
        for name in self.names:
            c, tokens = aux[name], hidden.view.batch.tokens[name]
            process, outer = net.field(name).process, tokens.valid.ndim - 1
            target, value = _fold((tokens.target & tokens.valid, tokens.value), outer)
            if c.x0.ndim < value.ndim:  # a learned codec makes ids of vectors
                value = c.x0
            found = self.losses[name](process, self._output(net, hidden, name), c, value)
            prefix = "" if len(self.names) == 1 else f"{name}/"
            for number, (label, each) in enumerate(found.items()):
                if self.first_weight != 1:
                    block = hidden.view.layout.block_of(hidden.view.batch, name)
                    each = each * weight_by_block(block, self.first_weight)
                terms[prefix + label] = LossTerm(jnp.where(target, each, 0).sum(), target.sum(dtype=jnp.float32))
                if number == 0:
                    t = jnp.broadcast_to(c.t, each.shape)
                    terms |= by_time(prefix + label, each, t, target)
                    if process.state() is not None:
                        row, told = row_of(name) + STATISTICS, statistics(each, t, target)
                        terms[row] = terms[row] + told if row in terms else told
        return terms


def weight_by_block(block: Int[Array | np.ndarray, "*B N"], first: float) -> Float[Array, "*B N"]:
    """Factor of each token: first - (first - 1) i / N for a block that begins with token i."""
    length = block.shape[-1]
    begins = jnp.pad(jnp.diff(jnp.asarray(block)) != 0, [(0, 0)] * (block.ndim - 1) + [(1, 0)])
    start = jax.lax.cummax(jnp.where(begins, jnp.arange(length), 0), axis=block.ndim - 1)
    return first - (first - 1) * start / length


def statistics(
    values: Float[Array, "B N"], t: Float[Array, "B N"], target: Bool[Array, "B N"], bins: int = BINS
) -> LossTerm:
    """Sums and counts [bins, N] of the targets' losses by time and position, for the state of an adaptive process."""
    inside = (jnp.minimum((t * bins).astype(jnp.int32), bins - 1)[None] == jnp.arange(bins)[:, None, None]) & target
    total = jnp.where(inside, jax.lax.stop_gradient(values), 0).sum(axis=1)
    return LossTerm(total, inside.sum(axis=1, dtype=jnp.float32), trained=False)


def by_time(
    name: str, values: Float[Array, "B N"], t: Float[Array, "B N"], target: Bool[Array, "B N"]
) -> dict[str, LossTerm]:
    """Sums and counts of the targets in each quarter of diffusion time, `name@0.00-0.25` …, without gradient.

    A value that is not finite affects only its own quarter.
    """
    quarter = jnp.minimum((t * QUARTERS).astype(jnp.int32), QUARTERS - 1)  # t = 1 belongs to the last one
    terms = {}
    for i in range(QUARTERS):
        inside = target & (quarter == i)
        total, count = jnp.where(inside, values, 0).sum(), inside.sum(dtype=jnp.float32)
        terms[f"{name}@{i / QUARTERS:.2f}-{(i + 1) / QUARTERS:.2f}"] = LossTerm(total, count, trained=False)
    return terms


def _fold(tree: PyTree, outer: int) -> PyTree:
    """Arrays with their first `outer` axes merged."""
    return jax.tree.map(lambda a: a.reshape(-1, *a.shape[outer:]), tree)
