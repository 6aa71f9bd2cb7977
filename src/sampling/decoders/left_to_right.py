"""Token by token: every next one is drawn by the head of its field, from the state of all before it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.common.rng import stream
from src.interfaces import PyTree
from src.sampling.steps.next_token import Greedy
from src.sampling.walk import Walk
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftToRight:
    """Ids, or vectors. Given tokens are read instead of drawn.

    max_new_tokens   most tokens that a row gets behind its given beginning, where the field has no grid; None: as many
                     as the task's rows have room for
    choose           a class of `steps/next_token.py`: (key, logits [B, V]) -> ids [B]
    stop             a row ends with the end-of-text id of its field's codec, where that has one; it goes on with
                     padding, which nobody sees, until all rows have as many tokens

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
        """As long as the longest beginning and `max_new_tokens` together."""
        if self.max_new_tokens is None or not free:
            return segment
        return dataclasses.replace(segment, length=begin + self.max_new_tokens)

    def __call__(self, key: Array, walk: Walk, segment: Segment, more: bool) -> None:
        """One loop over the tokens. The key of a token is that of its name, folded with its slot in the row.

        Raises ValueError where nothing comes before the first token that is drawn.
        """
        names = [name for name in segment.names if name in walk.plan.made]
        begin = min(walk.plan.begin(name) for name in names)
        if begin:
            walk.run(segment, "clean", 0, begin, keep=True)
        if walk.last is None:
            raise ValueError(
                f"{segment.name} starts the rows, and nothing predicts its first token: give at least that"
            )
        keys = {name: stream(key, name) for name in names}
        slot = walk.view.layout.part(segment.name, "clean").start
        codec = walk.net.field(segment.name).field.codec
        end = getattr(codec.host, "eos", None) if self.stop and codec is not None else None
        pad = getattr(codec.host, "pad", 0) if end is not None else 0

        def token(carry: PyTree, index: Array) -> tuple[PyTree, None]:
            (arrays, done), ended = carry, jnp.zeros(walk.rows, bool)
            now = walk.at(arrays)
            for name in names:
                bound, target = now.net.field(name), _column(now.target(name), index)
                own = jax.random.fold_in(keys[name], slot + index)
                drawn = bound.sample(own, now.last, now.guide(name), self.choose)
                drawn = jnp.where(_like(done, drawn), jnp.asarray(pad, drawn.dtype), drawn)
                given = _column(now.value(name), index)
                value = jnp.where(_like(target, drawn), drawn.astype(given.dtype), given)
                there = jnp.where(target, ~done, _column(now.view.batch.tokens[name].valid[: now.rows], index))
                now.write(name, value[:, None], index, there[:, None])
                if name == segment.name and end is not None:
                    ended = target & (value == end)
            now.run(segment, "clean", index, 1, keep=True)
            return (now.arrays, done | ended), None

        start = (walk.arrays, jnp.zeros(walk.rows, bool))
        (arrays, _), _ = jax.lax.scan(token, start, jnp.arange(begin, segment.length))
        walk.view, walk.cache, walk.last = arrays
        walk.spec = walk.at(arrays).spec


def _column(a: Array, index: Array) -> Array:
    return jax.lax.dynamic_index_in_dim(a, index, axis=1, keepdims=False)


def _like(flags: Array, values: Array) -> Array:
    """Flags of rows, for arrays with more axes."""
    return flags.reshape(-1, *[1] * (values.ndim - 1))
