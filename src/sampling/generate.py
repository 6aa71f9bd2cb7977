"""Generation: a walk along the layout, with a key-value cache, that fills the segments which are not given."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from src.common.rng import stream
from src.interfaces import Net, Process, PyTree, StepSampler, View
from src.sampling.guidance import Guidance
from src.sampling.steps.gaussian import sample
from src.sequence.layout import Layout, Segment


@dataclasses.dataclass(frozen=True)
class TextSampler:
    """How text is generated: `choose` (sampling/steps/next_token.py) picks a token from logits, `stop` ends a row."""

    choose: Callable[[Array, Array], Array]
    stop: int
    pad: int


@dataclasses.dataclass(frozen=True)
class ImageSampler:
    """How an image is generated: process, step sampler, number of steps and classifier-free guidance."""

    process: Process
    sampler: StepSampler
    steps: int
    guidance: Guidance
    features: int  # P, patch features
    features_per_channel: int


@dataclasses.dataclass
class _Walk:
    """Where the walk stands: the next slot, the cache, and the hidden state of each row's last valid token."""

    cache: PyTree
    slot: int = 0
    last: Array | None = None


def generate(
    net: Net,
    layout: Layout,
    view: View,
    key: Array,
    *,
    generated: tuple[str, ...],
    text: TextSampler | None = None,
    image: ImageSampler | None = None,
    null: View | None = None,
) -> dict[str, Array]:
    """Fills the segments named in `generated`; returns ids `[B, N]` (padded after the stop) or patches `[B, N, P]`.

    view   the given segments. A generated text segment may have a given beginning of G <= N tokens there, padded to
           the right where rows differ; its first N - G tokens are then generated (and returned).
    null   the same rows without their prompt or label: guidance runs both, in one batch.
    """
    rows = next(iter(view.inputs.values())).shape[0] if view.inputs else view.labels.shape[0]
    if null is not None:
        if any(layout.segment(n).kind == "text" for n in generated):
            raise ValueError("guidance needs every text segment given; generate the text first, then the image")
        view = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), view, null)
    walk = _Walk(net.start_cache(layout, rows * (1 if null is None else 2)))
    out, waiting = {}, ()
    for index, segment in enumerate(layout.segments):
        if segment.kind == "time":
            waiting = (segment,)  # belongs to the image that follows
            continue
        part, waiting = Layout((*waiting, segment)), ()
        more = any(s.name in generated for s in layout.segments[index + 1 :])
        if segment.name not in generated:
            if more:
                _read(net, layout, part, view, walk)
        elif segment.kind == "text":
            out[segment.name] = _write_text(net, layout, segment, view, stream(key, segment.name), text, walk)
        else:
            x0 = _denoise(net, layout, part, view, stream(key, segment.name), image, walk, null is not None)
            out[segment.name] = x0[:rows]
            if more:
                given = view.replace(inputs=view.inputs | {segment.name: x0})
                _read(net, layout, part, given, walk)
        if not more:
            break
    return out


def _read(net: Net, layout: Layout, part: Layout, view: View, walk: _Walk) -> None:
    """Prefill: a given part goes into the cache in one pass."""
    hidden, walk.cache = net.extend(layout, part, walk.slot, view, walk.cache)
    newest = _last_valid(hidden.sequence, hidden.valid)
    some = hidden.valid.any(axis=1)[:, None]
    walk.last = newest if walk.last is None else jnp.where(some, newest, walk.last)
    walk.slot += part.length


def _last_valid(sequence: Float[Array, "B N D"], valid: Bool[Array, "B N"]) -> Float[Array, "B D"]:
    index = jnp.max(jnp.where(valid, jnp.arange(valid.shape[1]), 0), axis=1)
    return jnp.take_along_axis(sequence, index[:, None, None], axis=1)[:, 0]


def _write_text(
    net: Net, layout: Layout, segment: Segment, view: View, key: Array, text: TextSampler, walk: _Walk
) -> Int[Array, "B N"]:
    """The token loop. Rows that have stopped go on with padding, which nobody sees."""
    given = view.inputs[segment.name].shape[1] if segment.name in view.inputs else 0
    end = walk.slot + segment.length
    if given:
        _read(net, layout, Layout((dataclasses.replace(segment, length=given),)), view, walk)
    if walk.last is None:
        raise ValueError(f"segment {segment.name!r} starts the row: give at least its first token")

    def token(carry, slot):
        last, done, cache = carry
        ids = text.choose(jax.random.fold_in(key, slot), net.text_logits(last[:, None])[:, 0])
        ids = jnp.where(done, text.pad, ids).astype(jnp.int32)
        last, cache = net.extend_token(layout, ids, ~done, slot, cache)
        return (last, done | (ids == text.stop), cache), ids

    done = jnp.zeros(walk.last.shape[0], bool)
    (walk.last, _, walk.cache), ids = jax.lax.scan(token, (walk.last, done, walk.cache), jnp.arange(walk.slot, end))
    walk.slot = end
    return ids.T


def _denoise(
    net: Net, layout: Layout, part: Layout, view: View, key: Array, image: ImageSampler, walk: _Walk, guided: bool
) -> Float[Array, "B N P"]:
    """A scan of denoising steps over the cached prefix; the cache itself stays as it was."""
    name = part.segments[-1].name
    total = jax.tree.leaves(walk.cache)[0].shape[1]
    rows = total // 2 if guided else total
    process = image.process

    def denoise(xt, t):
        both = jnp.concatenate([xt, xt]) if guided else xt
        times = jnp.broadcast_to(process.time_input(t), (total, 1))
        shown = view.replace(inputs=view.inputs | {name: both}, times=view.times | {name: times})
        hidden, _ = net.extend(layout, part, walk.slot, shown, walk.cache)
        prediction = net.image_prediction(hidden.of(name), hidden.vectors[name])
        if guided:
            cond, free = (jax.tree.map(lambda a, i=i: a[i * rows : (i + 1) * rows], prediction) for i in (0, 1))
            prediction = image.guidance(cond, free, t, image.features_per_channel)
        return process.convert(prediction, xt, t)

    start_key, loop_key = jax.random.split(key)
    xt = process.prior(start_key, (rows, part.segments[-1].length, image.features))
    x0 = sample(image.sampler, process, denoise, loop_key, xt, image.steps)
    return jnp.concatenate([x0, x0]) if guided else x0
