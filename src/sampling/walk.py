"""The walk along the segments of rows with one cache of keys and values, used by all decoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from src.interfaces import Batch, Guide, Layout, Net, PyTree, SequenceSpec, View, row_of
from src.sampling.guidance import Guidance, paired, pairs
from src.sequence.segment import Segment


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """The names to generate; static for compilation.

    made     names with a target in some row
    mixed    those of them that also have given tokens
    begins   for each name of `made`, number of first tokens that are given in all rows
    """

    made: tuple[str, ...]
    mixed: tuple[str, ...] = ()
    begins: tuple[int, ...] = ()

    def begin(self, name: str) -> int:
        """Number of first tokens of a name that are given in all rows."""
        return dict(zip(self.made, self.begins, strict=True))[name]


def plan_of(layout: Layout, batch: Batch) -> SamplingPlan:
    """The plan of rows whose `target` and `valid` are numpy arrays."""
    made, mixed, begins = [], [], []
    for name in (name for segment in layout.segments for name in segment.names):
        tokens = batch.tokens[name]
        target = np.asarray(tokens.target) & np.asarray(tokens.valid)
        if not target.any():
            continue
        made.append(name)
        begins.append(int(np.argmax(target, axis=1)[target.any(axis=1)].min()))
        if not target.all():
            mixed.append(name)
    return SamplingPlan(tuple(made), tuple(mixed), tuple(begins))


class NoisyTokens(NamedTuple):
    """Neighbouring tokens of a name at time t: x_t, t of rows [B, 1] or tokens [B, n], and the self-conditioning hint,
    if any."""

    xt: PyTree
    t: Float[Array, "B T"]
    hint: Array | None = None


@runtime_checkable
class Decoder(Protocol):
    """Generates the tokens of a segment; a class of `decoders/`."""

    def fit(self, segment: Segment, begin: int, free: bool) -> Segment:
        """The segment with this decoder's length and blocks; `begin`: largest number of given first tokens of a row,
        `free`: its field has no grid, so that its length may change."""
        ...

    def __call__(self, key: Array, walk: Walk, segment: Segment, more: bool) -> None:
        """Writes the segment's names into the walk; `more`: a later segment will be generated."""
        ...


@dataclasses.dataclass
class Walk:
    """State of sampling, made by `begin`.

    view       rows with values of full length; with guidance, each row with conditions and behind it the same without
    plan       names to generate
    guidance   None: no guidance, and each row is there once
    spec       `SequenceSpec` of the view
    cache      keys and values of the tokens so far
    last       state of each row's last valid token in the cache [B, D], None at the start of the rows
    calls      passes of the network that each generated row needed so far, or all of them; decoders count them
    """

    net: Net
    view: View
    plan: SamplingPlan
    guidance: Guidance | None
    spec: SequenceSpec
    cache: PyTree
    last: Array | None = None
    calls: Array | int = 0

    @classmethod
    def begin(
        cls, net: Net, view: View, plan: SamplingPlan, null: View | None = None, guidance: Guidance | None = None
    ) -> Walk:
        """A walk at the start of its rows; with guidance if `null`, the same rows without conditions, is given.

        Raises ValueError if the network has no cache and the rows have several segments.
        """
        if null is not None:
            view = jax.tree.map(paired, view, null)
        view = jax.tree.map(jnp.asarray, view)
        cache = net.start_cache(view)
        if cache is None and len(view.layout.segments) > 1:
            raise ValueError(
                "this trunk has no cache, so rows of several segments cannot be sampled: use attention, or rows of one"
                " segment"
            )
        return cls(net, view, plan, guidance if null is not None else None, view.layout.spec(view.batch), cache)

    @property
    def rows(self) -> int:
        """Number of generated rows."""
        total = next(iter(self.view.batch.tokens.values())).valid.shape[0]
        return total if self.guidance is None else total // 2

    # ------------------------------------------------------------------ arrays, the carry of a scan

    @property
    def arrays(self) -> PyTree:
        """The arrays that change during sampling."""
        return self.view, self.cache, self.last, self.calls

    def at(self, arrays: PyTree) -> Walk:
        """The walk with other `arrays`."""
        view, cache, last, calls = arrays
        spec = view.layout.spec(view.batch)
        return dataclasses.replace(self, view=view, spec=spec, cache=cache, last=last, calls=calls)

    def become(self, arrays: PyTree) -> None:
        """Takes other `arrays`, after a loop."""
        self.view, self.cache, self.last, self.calls = arrays
        self.spec = self.view.layout.spec(self.view.batch)

    # ------------------------------------------------------------------ rows with guidance

    def double(self, x: PyTree) -> PyTree:
        """Arrays of the generated rows, repeated for all rows of the view."""
        return x if self.guidance is None else jax.tree.map(lambda a: paired(a, a), x)

    def single(self, x: PyTree) -> PyTree:
        """Arrays of all rows of the view, of the generated rows alone: with guidance those with conditions."""
        return x if self.guidance is None else jax.tree.map(lambda a: pairs(a)[0], x)

    def guide(self, name: str) -> Guide:
        """(output of a name's head for all rows of the view, scalar t) -> guided output for the generated rows."""
        bound = self.net.field(name)
        process, guidance = bound.process, self.guidance
        width = None if process is None else process.guided
        if guidance is not None and guidance.features and bound.field.spec.vocab is None:
            width = min(guidance.features, width or guidance.features)

        def guided(output: Array, t: Array) -> Array:
            if guidance is None:
                return output
            return guidance(*pairs(output), t, width)

        return guided

    # ------------------------------------------------------------------ tokens

    def past(self, name: str, index: Any, count: int) -> Array:
        """The `count` tokens of a name before `index`, the oldest first, in all rows of the view [B, count, …]; zeros
        where there is none."""
        value = self.view.batch.tokens[name].value
        padded = jnp.pad(value, ((0, 0), (count, 0), *[(0, 0)] * (value.ndim - 2)))
        return jax.lax.dynamic_slice_in_dim(padded, index, count, axis=1)

    def value(self, name: str) -> Array:
        """The tokens of a name in the generated rows."""
        return self.single(self.view.batch.tokens[name].value)

    def target(self, name: str) -> Bool[Array, "rows N"]:
        """The tokens to generate, bool."""
        tokens = self.view.batch.tokens[name]
        return self.single(tokens.target & tokens.valid)

    def write(self, name: str, value: Array, start: Any, valid: Array | None = None) -> None:
        """Writes tokens [rows, n, …] of a name from `start` on, and their `valid` [rows, n]: padding is masked."""
        batch = self.view.batch
        old = batch.tokens[name]
        new = old.replace(value=_put(old.value, self.double(value), start))
        tokens = batch.tokens | {name: new}
        if valid is not None:
            valid = _put(old.valid, self.double(valid), start)
            shared = self.view.layout.segment(name).names
            tokens |= {each: tokens[each].replace(valid=valid) for each in shared}
        self.view = self.view.replace(batch=batch.replace(tokens=tokens))
        if valid is not None:
            self.spec = self.view.layout.spec(self.view.batch)

    # ------------------------------------------------------------------ the network

    def run(self, segment: Segment, copy: str, start: Any, size: int, keep: bool) -> Float[Array, "B n D"]:
        """States of the tokens start … start + size - 1 of a segment's copy; with `keep`, they stay in the cache."""
        hidden, cache = self.net.extend(self.view, segment, copy, start, size, self.spec, self.cache)
        if keep:
            self.cache = cache
            valid = jax.lax.dynamic_slice_in_dim(self.view.batch.tokens[segment.name].valid, start, size, axis=1)
            newest = _last_valid(hidden, valid)
            self.last = newest if self.last is None else jnp.where(valid.any(axis=1)[:, None], newest, self.last)
        return hidden

    def read(self, segment: Segment) -> None:
        """Puts a given segment into the cache."""
        self.run(segment, "noisy" if segment.role == "noisy" else "clean", 0, segment.length, keep=True)
        self.calls = self.calls + 1

    def with_noisy(self, segment: Segment, tokens: Mapping[str, NoisyTokens], start: Any) -> Walk:
        """The walk whose network reads these noisy tokens from `start` on."""
        noisy, times, hints = {}, {}, {}
        for name, (xt, t, hint) in tokens.items():
            value, time = self.net.field(name).process.network(xt, t)
            noisy[name] = self._whole(value, start, segment.length)
            times[name] = self.double(time) if t.shape[1] == 1 else self._whole(time, start, segment.length)
            if hint is not None:
                hints[name] = self._whole(hint, start, segment.length)
        return dataclasses.replace(self, view=self.view.replace(noisy=noisy, times=times, hints=hints))

    def predict(
        self, segment: Segment, tokens: Mapping[str, NoisyTokens], start: Any, size: int, t: Array
    ) -> dict[str, Array]:
        """Guided outputs of the heads for noisy tokens at the scalar time t, [rows, n, outputs]."""
        there = self.with_noisy(segment, tokens, start)
        hidden = there.run(segment, "noisy", start, size, keep=False)
        vector = self.net.vector(there.view, segment, "noisy")
        if vector is not None and vector.shape[1] > 1:
            vector = jax.lax.dynamic_slice_in_dim(vector, start, size, axis=1)
        return {name: self.guide(name)(self.net.field(name)(hidden, vector), t) for name in tokens}

    def _whole(self, piece: Array, start: Any, length: int) -> Array:
        """A piece [rows, n, …] at `start` of `length` tokens, zeros elsewhere, for all rows of the view."""
        piece = self.double(piece)
        if piece.shape[1] == length:
            return piece
        return _put(jnp.zeros((piece.shape[0], length, *piece.shape[2:]), piece.dtype), piece, start)


def fill(walk: Walk, key: Array, decoders: Mapping[str, Decoder]) -> dict[str, Array]:
    """Generates the names of the plan from left to right. Returns their values, [rows, N, …].

    decoders   by field; a segment uses that of its first name
    """
    segments = walk.view.layout.segments
    making = [index for index, segment in enumerate(segments) if set(segment.names) & set(walk.plan.made)]
    for index, segment in enumerate(segments[: making[-1] + 1]):
        if index in making:
            decoders[row_of(segment.name)](key, walk, segment, more=index < making[-1])
        else:
            walk.read(segment)
    return {name: walk.value(name) for name in walk.plan.made}


def _put(whole: Array, piece: Array, start: Any) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(whole, piece.astype(whole.dtype), start, axis=1)


def _last_valid(states: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    index = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    return jnp.take_along_axis(states, index[:, None, None], axis=1)[:, 0]
