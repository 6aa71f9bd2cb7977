"""Block-by-block decoding: the tokens of a block are denoised together, given the blocks before it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from src.common.rng import stream
from src.interfaces import PyTree
from src.sampling.loop import FieldSampler, integrate_counted, min_float32
from src.sampling.walk import NoisyTokens, Walk
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class Blocks:
    """Denoises each block with the processes of its fields; names on the same tokens share every pass of the network.

    steps           reverse steps of each block, at most: some step samplers end a block before
    blocks          mask mode or sizes that replace those of the task's layout; None: the layout's
    max_new_tokens  least number of new tokens that there is room for, in whole blocks, for a field without a grid;
                    None: up to the length of the segment
    stop            rows end with the block that has the end-of-text id of the field's codec, if it has one; what
                    follows is masked padding, and nothing is made once all rows have ended
    step            a step sampler in place of those of the fields (`sampling/steps`)

    Raises ValueError for steps below 1, and a number of tokens below 1.
    """

    PARTS: ClassVar[dict[str, str]] = {"step": "sampling/steps"}

    steps: int
    blocks: Any = None
    max_new_tokens: int | None = None
    stop: bool = True
    step: Any = None

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} must be at least 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        if isinstance(self.blocks, list):
            object.__setattr__(self, "blocks", tuple(self.blocks))

    def fit(self, segment: Segment, begin: int, free: bool) -> Segment:
        """The segment with the decoder's blocks, only on the noisy copy if that has blocks of its own, and with room
        for the new tokens. Raises ValueError for a number of tokens in one block, or in blocks of several sizes."""
        if self.blocks is not None:
            option = "blocks" if segment.noisy_blocks is None else "noisy_blocks"
            segment = dataclasses.replace(segment, **{option: self.blocks})
        if self.max_new_tokens is None or not free:
            return segment
        size = segment.blocks if segment.noisy_blocks is None else segment.noisy_blocks
        if not size or isinstance(size, tuple):
            raise ValueError(
                f"max_new_tokens={self.max_new_tokens} of the decoder `blocks` needs blocks of one size, and segment"
                f" {segment.name} has {size or 'one block'}: leave it out"
            )
        return dataclasses.replace(segment, length=-(-(begin + self.max_new_tokens) // size) * size)

    def __call__(self, key: Array, walk: Walk, segment: Segment, more: bool) -> None:
        """Denoises all blocks. A block has the key of its name, folded with its number if there are several, split into
        the keys of the first noise and of the steps, which is folded with the step's number.

        Clean tokens that all rows begin with are read in one pass. Blocks of one size run in one loop, in which the
        process's `prior` gets no `past`.

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
        if looped:
            first = max(first, self._read_given(walk, segment, sizes[0]))
            self._loop(walk, segment, keys_of, sizes[0], range(first, looped), more)
        return None

    def _read_given(self, walk: Walk, segment: Segment, size: int) -> int:
        """Reads the first blocks that are given in all rows, in one pass; gives their number."""
        if segment.role != "copies" or segment.markov or any(name not in walk.plan.made for name in segment.names):
            return 0
        given = min(walk.plan.begin(name) for name in segment.names) // size
        if given:
            walk.run(segment, "clean", 0, given * size, keep=True)
            walk.calls = walk.calls + 1
        return given

    def _loop(self, walk: Walk, segment: Segment, keys_of: Any, size: int, numbers: range, more: bool) -> None:
        """Denoises blocks of one size, up to the end of text of all rows."""
        if walk.last is None:  # zeros, since the carry of a loop has a fixed structure
            width = jax.eval_shape(lambda: walk.run(segment, "noisy", 0, size, keep=False))
            walk.last = jnp.zeros((width.shape[0], width.shape[2]), width.dtype)
        end = _End.of(walk, segment) if self.stop else None
        done = jnp.zeros(walk.rows, bool)
        by_row = end is not None or any(
            hasattr(self.step or walk.net.field(n).field.step, "finished") for n in segment.names
        )
        walk.calls = jnp.broadcast_to(jnp.int32(walk.calls), (walk.rows,) if by_row else ())
        keep = more or not segment.markov

        def block(carry: PyTree, number: Array) -> tuple[PyTree, None]:
            arrays, done = carry
            now = walk.at(arrays)
            finished = self._denoised(now, segment, keys_of(number), number * size, size, done if end else None)
            last = (number == numbers.stop - 1) & (not more)  # nobody reads the last block of a row
            if end is not None:
                before, done = done, done | end.reached(now, number * size, size)
                now.calls = jnp.where(before, carry[0][-1], now.calls)
                last = before | last | (done & (not more))
            if keep and (more or end is None):
                self._keep(now, segment, finished, number * size, size)
            elif keep:
                kept = lambda arrays: self._kept(now.at(arrays), segment, finished, number * size, size)
                now.become(jax.lax.cond(last.all(), lambda arrays: arrays, kept, now.arrays))
            now.calls = now.calls + (keep & ~last)
            return (now.arrays, done), None

        if end is None or more:
            (arrays, done), _ = jax.lax.scan(block, (walk.arrays, done), jnp.asarray(numbers, jnp.int32))
            return walk.become(arrays)

        def going(loop: PyTree) -> Array:
            return (loop[0] < numbers.stop) & ~loop[1][1].all()

        start = jnp.int32(numbers.start), (walk.arrays, done)
        loop = jax.lax.while_loop(going, lambda loop: (loop[0] + 1, block(loop[1], loop[0])[0]), start)
        return walk.become(loop[1][0])

    def _block(self, walk: Walk, segment: Segment, keys: dict[str, Array], start: Any, size: int, keep: bool) -> None:
        """Denoises one block, and with `keep` caches it."""
        finished = self._denoised(walk, segment, keys, start, size)
        if keep:
            self._keep(walk, segment, finished, start, size)
            walk.calls = walk.calls + 1

    def _denoised(
        self, walk: Walk, segment: Segment, keys: dict[str, Array], start: Any, size: int, done: Array | None = None
    ) -> dict[str, PyTree]:
        """Denoises one block and writes it; gives x at t = 0, by name. Rows that are `done` get padding."""
        parts = {name: _Part(walk, name, start, size, key, done, self.step) for name, key in keys.items()}
        finished, taken = self._denoise(walk, segment, parts, start, size)
        walk.calls = walk.calls + taken
        for name, part in parts.items():
            made = part.pick(part.bound.decode(part.process.clean(finished[name])), part.value)
            walk.write(name, made, start, None if done is None else part.valid & ~(part.wanted & done[:, None]))
        return finished

    def _keep(self, walk: Walk, segment: Segment, finished: dict[str, PyTree], start: Any, size: int) -> None:
        """Caches keys and values of a block."""
        if segment.role == "copies":
            walk.run(segment, "clean", start, size, keep=True)
            return
        clean = jnp.zeros((walk.rows, 1), jnp.float32)
        there = walk.with_noisy(segment, {name: NoisyTokens(xt, clean) for name, xt in finished.items()}, start)
        there.run(segment, "noisy", start, size, keep=True)
        walk.cache, walk.last = there.cache, there.last

    def _kept(self, walk: Walk, *block: Any) -> PyTree:
        """The arrays of a walk after `_keep`."""
        self._keep(walk, *block)
        return walk.arrays

    def _denoise(
        self, walk: Walk, segment: Segment, parts: dict[str, _Part], start: Any, size: int
    ) -> tuple[dict[str, PyTree], Array]:
        """The block's x at t = 0, by name, and the number of steps. The hint of the first step is zeros."""

        def evaluate(xts: dict[str, PyTree], t: Array, hints: dict[str, Array]) -> dict[str, PyTree]:
            times = {n: part.token_times(t) for n, part in parts.items()}
            tokens = {n: NoisyTokens(xts[n], _of_rows(times[n], walk.rows), hints.get(n)) for n in parts}
            outputs = walk.predict(segment, tokens, start, size, t)
            return {n: part.process.estimate(outputs[n], xts[n], times[n]) for n, part in parts.items()}

        xts = {name: min_float32(part.first()) for name, part in parts.items()}
        grids = [jnp.asarray(part.step.times(part.process, self.steps)) for part in parts.values()]
        times = functools.reduce(jnp.minimum, grids)  # they share one time; some processes begin below 1
        hinted = [name for name, part in parts.items() if part.field.hint]
        shapes = jax.eval_shape(lambda: evaluate(xts, times[0], {})) if hinted else {}
        hints = {n: jax.eval_shape(parts[n].process.hint, shapes[n]) for n in hinted}
        hints = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), hints)
        samplers = {
            n: FieldSampler(p.step, p.process, p.loop_key, p.keep_given, p.token_times) for n, p in parts.items()
        }
        return integrate_counted(samplers, evaluate, xts, times, hints)


@dataclasses.dataclass(frozen=True)
class _End:
    """The end-of-text id of a segment's first name."""

    name: str
    id: int

    @classmethod
    def of(cls, walk: Walk, segment: Segment) -> _End | None:
        """None where the codec of its field has none."""
        codec = walk.net.field(segment.name).field.codec
        end = getattr(getattr(codec, "host", None), "eos", None)
        return None if end is None or segment.name not in walk.plan.made else cls(segment.name, end)

    def reached(self, walk: Walk, start: Any, size: int) -> Bool[Array, " rows"]:
        """Rows in which one of these tokens, that was made, is the end."""
        ended = walk.target(self.name) & (walk.value(self.name) == self.id)
        return jax.lax.dynamic_slice_in_dim(ended, start, size, axis=1).any(axis=1)


class _Part:
    """One name of a block: its field, keys and given tokens."""

    def __init__(self, walk: Walk, name: str, start: Any, size: int, key: Array, done: Array | None, step: Any):
        self.bound = walk.net.field(name)
        self.field, self.process = self.bound.field, self.bound.process
        self.step = step or self.field.step
        if self.process is None or self.step is None:
            raise ValueError(f"fields.{self.field.name} has no process or no step, which the decoder `blocks` needs")
        self.shape = (walk.rows, size)
        self.start_key, self.loop_key = jax.random.split(key)
        cut = lambda a: jax.lax.dynamic_slice_in_dim(a, start, size, axis=1)
        self.value = cut(walk.value(name))
        self.valid, self.wanted = cut(walk.single(walk.view.batch.tokens[name].valid)), cut(walk.target(name))
        self.target = self.wanted if name in walk.plan.mixed else None
        if done is not None:
            self.target = self.wanted & ~done[:, None]
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
