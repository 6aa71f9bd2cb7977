"""Token-by-token decoding: the head of a field samples each token from the state of all tokens before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.common.mesh.constraints import automatic_axes
from src.common.rng import stream
from src.interfaces import PyTree
from src.sampling.steps.next_token import Greedy
from src.sampling.walk import Walk
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftToRight:
    """Samples ids or vectors; given tokens are kept.

    max_new_tokens   largest number of new tokens, for a field without a grid; None: up to the length of the segment
    choose           a class of `steps/next_token.py`: (key, logits [B, V]) -> ids [B]
    stop             rows end at the end-of-text id of the field's codec, if it has one, and go on with masked padding
                     until the last row is done, which ends the loop on one device unless something follows

    Raises ValueError for a number below 1.
    """

    PARTS: ClassVar[dict[str, str]] = {"choose": "sampling/steps"}

    max_new_tokens: int | None = None
    choose: Callable[[Array, Array], Array] = dataclasses.field(default_factory=Greedy)
    stop: bool = True

    def __post_init__(self):
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")

    def fit(self, segment: Segment, begin: int, free: bool) -> Segment:
        """The segment with length `begin` + `max_new_tokens`, and without noisy copies of causal tokens."""
        if segment.role == "copies" and segment.blocks == 1:
            segment = dataclasses.replace(segment, role="clean", noisy_blocks=None)
        if self.max_new_tokens is None or not free:
            return segment
        return dataclasses.replace(segment, length=begin + self.max_new_tokens)

    def __call__(self, key: Array, walk: Walk, segment: Segment, more: bool) -> None:
        """Samples the tokens in one loop. A token's key is that of its name, folded with its slot in the row.

        Raises ValueError if no token precedes the first sampled one.
        """
        names = [name for name in segment.names if name in walk.plan.made]
        begin = min(walk.plan.begin(name) for name in names)
        if begin:
            walk.run(segment, "clean", 0, begin, keep=True)
            walk.calls = walk.calls + 1
        if walk.last is None:
            raise ValueError(f"{segment.name} starts the rows, so no token predicts its first one: give at least that")
        keys = {name: stream(key, name) for name in names}
        slot = walk.view.layout.part(segment.name, "clean").start
        codec = walk.net.field(segment.name).field.codec
        end = getattr(codec.host, "eos", None) if self.stop and codec is not None else None
        pad = getattr(codec.host, "pad", 0) if end is not None else 0

        def token(carry: PyTree, index: Array) -> tuple[PyTree, None]:
            (arrays, done), ended, made = carry, jnp.zeros(walk.rows, bool), jnp.zeros(walk.rows, bool)
            now = walk.at(arrays)
            for name in names:
                bound, target = now.net.field(name), _column(now.target(name), index)
                own = jax.random.fold_in(keys[name], slot + index)
                past = (bound.encode(now.past(name, index, bound.past)),) if bound.past else ()
                drawn = bound.sample(own, now.last, now.guide(name), self.choose, *past)
                drawn = jnp.where(_like(done, drawn), jnp.asarray(pad, drawn.dtype), drawn)
                given = _column(now.value(name), index)
                value = jnp.where(_like(target, drawn), drawn.astype(given.dtype), given)
                there = jnp.where(target, ~done, _column(now.single(now.view.batch.tokens[name].valid), index))
                now.write(name, value[:, None], index, there[:, None])
                made = made | (target & ~done)
                if name == segment.name and end is not None:
                    ended = target & (value == end)
            now.run(segment, "clean", index, 1, keep=True)
            now.calls = now.calls + (made & ~ended & (index < segment.length - 1))  # nothing is read behind the last
            return (now.arrays, done | ended), None

        walk.calls = jnp.broadcast_to(jnp.int32(walk.calls), (walk.rows,))
        start = (walk.arrays, jnp.zeros(walk.rows, bool))
        if end is None or more or automatic_axes():  # devices do not ask each other whether their rows have ended
            return walk.become(jax.lax.scan(token, start, jnp.arange(begin, segment.length))[0][0])

        def going(loop: PyTree) -> Array:
            return (loop[0] < segment.length) & ~loop[1][1].all()

        step = lambda loop: (loop[0] + 1, token(loop[1], loop[0])[0])
        index, (arrays, _) = jax.lax.while_loop(going, step, (jnp.int32(begin), start))
        walk.become(arrays)
        return _pad_from(index, walk, names, pad)


def _column(a: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(a, index, axis=1, keepdims=False)


def _pad_from(index: Array, walk: Walk, names: list[str], pad: int) -> None:
    """Makes padding of the targets from `index` on, before which all rows have ended."""
    unmade = [walk.target(name) & (jnp.arange(walk.value(name).shape[1]) >= index) for name in names]
    for name, flags in zip(names, unmade, strict=True):
        value = walk.value(name)
        filled = jnp.where(flags.reshape(*flags.shape, *[1] * (value.ndim - 2)), jnp.asarray(pad, value.dtype), value)
        walk.write(name, filled, 0, walk.single(walk.view.batch.tokens[name].valid) & ~flags)


def _like(flags: Array, values: Array) -> Array:
    """Flags [B], shaped to broadcast against values [B, …]."""
    return flags.reshape(-1, *[1] * (values.ndim - 1))
