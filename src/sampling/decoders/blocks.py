"""Block-by-block decoding: the tokens of a block are denoised together, given the blocks before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.common.rng import stream
from src.interfaces import PyTree
from src.sampling.loop import FieldSampler, integrate_all, min_float32
from src.sampling.walk import NoisyTokens, Walk
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Denoises each block with the processes of its fields; names on the same tokens share every pass of the network.

    steps    reverse steps of each block
    blocks   mask mode or sizes that replace those of the task's layout; None: the layout's

    Raises ValueError for steps below 1.
    """

    steps: int
    blocks: Any = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def fit(self, segment: Segment, begin: int, free: bool) -> Segment:
        """The segment with the decoder's blocks, only on the noisy copy if that has blocks of its own."""
        if self.blocks is None:
            return segment
        option = "blocks" if segment.noisy_blocks is None else "noisy_blocks"
        return dataclasses.replace(segment, **{option: self.blocks})

    def __call__(self, key: Array, walk: Walk, segment: Segment, more: bool) -> None:
        """Denoises all blocks. A block has the key of its name, folded with its number if there are several, split into
        the keys of the first noise and of the steps, which is folded with the step's number.

        Blocks of one size run in one loop, in which the process's `prior` gets no `past`.

        Raises ValueError for a segment without noisy tokens.
        """
        if segment.role == "clean":
            raise ValueError(
                f"segment {segment.name} has no noisy tokens, which the decoder `blocks` needs: use left_to_right, or"
                " an objective that adds noise to it"
            )
        keys = {name: stream(key, name) for name in segment.names if name in walk.plan.made}
        sizes = segment.sizes(noisy=segment.role == "copies")
        if len(sizes) == 1:
            return self._block(walk, segment, keys, 0, sizes[0], keep=more)
        keys_of = lambda number: {name: jax.random.fold_in(k, number) for name, k in keys.items()}
        looped = len(sizes) if len(set(sizes)) == 1 else 0
        first = 1 if segment.lead and looped else 0  # a block with a lead needs a static start
        for number in range(first if looped else len(sizes)):
            start = sum(sizes[:number])
            read = more or (number < len(sizes) - 1 and not segment.markov)
            self._block(walk, segment, keys_of(number), start, sizes[number], keep=read)
        if not looped:
            return None

        def block(arrays: PyTree, number: Array) -> tuple[PyTree, None]:
            now = walk.at(arrays)
            self._block(now, segment, keys_of(number), number * sizes[0], sizes[0], keep=more or not segment.markov)
            return now.arrays, None

        if walk.last is None:  # zeros, since the carry of a scan has a fixed structure
            width = jax.eval_shape(lambda: walk.run(segment, "noisy", 0, sizes[0], keep=False))
            walk.last = jnp.zeros((width.shape[0], width.shape[2]), width.dtype)
        walk.view, walk.cache, walk.last = jax.lax.scan(block, walk.arrays, jnp.arange(first, looped))[0]
        return None

    def _block(self, walk: Walk, segment: Segment, keys: dict[str, Array], start: Any, size: int, keep: bool) -> None:
        """Denoises one block, writes it, and with `keep` caches its keys and values."""
        parts = {name: _Part(walk, name, start, size, key) for name, key in keys.items()}
        finished = self._denoise(walk, segment, parts, start, size)
        for name, part in parts.items():
            made = part.bound.decode(part.process.clean(finished[name]))
            walk.write(name, part.pick(made, part.value), start)
        if not keep:
            return
        if segment.role == "copies":
            walk.run(segment, "clean", start, size, keep=True)
            return
        clean = jnp.zeros((walk.rows, 1), jnp.float32)
        there = walk.with_noisy(segment, {name: NoisyTokens(xt, clean) for name, xt in finished.items()}, start)
        there.run(segment, "noisy", start, size, keep=True)
        walk.cache, walk.last = there.cache, there.last

    def _denoise(
        self, walk: Walk, segment: Segment, parts: dict[str, _Part], start: Any, size: int
    ) -> dict[str, PyTree]:
        """The block's x at t = 0, by name. The hint of the first step is zeros."""

        def evaluate(xts: dict[str, PyTree], t: Array, hints: dict[str, Array]) -> dict[str, PyTree]:
            times = {n: part.token_times(t) for n, part in parts.items()}
            tokens = {n: NoisyTokens(xts[n], _of_rows(times[n], walk.rows), hints.get(n)) for n in parts}
            outputs = walk.predict(segment, tokens, start, size, t)
            return {n: part.process.estimate(outputs[n], xts[n], times[n]) for n, part in parts.items()}

        xts = {name: min_float32(part.first()) for name, part in parts.items()}
        grids = [jnp.asarray(part.field.step.times(part.process, self.steps)) for part in parts.values()]
        times = functools.reduce(jnp.minimum, grids)  # they share one time; some processes begin below 1
        hinted = [name for name, part in parts.items() if part.field.hint]
        shapes = jax.eval_shape(lambda: evaluate(xts, times[0], {})) if hinted else {}
        hints = {n: jax.eval_shape(parts[n].process.hint, shapes[n]) for n in hinted}
        hints = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), hints)
        samplers = {
            n: FieldSampler(p.field.step, p.process, p.loop_key, p.keep_given, p.token_times) for n, p in parts.items()
        }
        return integrate_all(samplers, evaluate, xts, times, hints)


class _Part:
    """One name of a block: its field, keys and given tokens."""

    def __init__(self, walk: Walk, name: str, start: Any, size: int, key: Array):
        self.bound = walk.net.field(name)
        self.field, self.process = self.bound.field, self.bound.process
        if self.process is None or self.field.step is None:
            raise ValueError(f"fields.{self.field.name} has no process or no step, which the decoder `blocks` needs")
        self.shape = (walk.rows, size)
        self.start_key, self.loop_key = jax.random.split(key)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        self.value = cut(walk.value(name))
        self.target = cut(walk.target(name)) if name in walk.plan.mixed else None
        self.past = None
        if isinstance(start, int) and start:
            self.past = self.bound.encode(walk.value(name)[:, :start])
        if self.target is not None:
            noise = jax.eval_shape(lambda: self.process.noise(jax.random.key(0), self.shape))
            noise = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), noise)
            clean = jnp.zeros((walk.rows, 1), jnp.float32)
            self.given = min_float32(self.process.corrupt(self.bound.encode(self.value), noise, clean).xt)

    def first(self) -> PyTree:
        """x at t = 1."""
        return self.process.prior(self.start_key, self.shape, self.past)

    def token_times(self, t: Array) -> Array:
        """The scalar t, or if some tokens are given, a time for each token: 0 for those."""
        return t if self.target is None else jnp.where(self.target, t, 0.0)

    def keep_given(self, xt: PyTree) -> PyTree:
        """x_t with the given tokens put back."""
        return xt if self.target is None else jax.tree.map(self.pick, xt, self.given)

    def pick(self, made: Array, given: Array) -> Array:
        """`made` at targets, `given` elsewhere."""
        if self.target is None:
            return made
        return jnp.where(self.target.reshape(*self.shape, *[1] * (made.ndim - 2)), made, given)


def _of_rows(t: Array, rows: int) -> Array:
    return t if t.ndim else jnp.broadcast_to(t, (rows, 1))
