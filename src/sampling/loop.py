"""The loop of reverse steps, for one field or several that share tokens and times."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from src.interfaces import Process, PyTree, StepSampler

Denoise = Callable[[PyTree, Array], PyTree]  # (x_t, scalar t) -> the process's estimate
# (x_t by name, scalar t, self-conditioning hints by name) -> estimates by name
DenoiseAll = Callable[[dict[str, PyTree], Array, dict[str, Array]], dict[str, PyTree]]


def _same(x: PyTree) -> PyTree:
    return x


@dataclasses.dataclass(frozen=True)
class FieldSampler:
    """The step sampler of one field.

    key           folded with the number of each step
    keep_given    x_t -> x_t with the given tokens put back
    token_times   scalar t -> t, or times of tokens with 0 for given ones
    """

    sampler: StepSampler
    process: Process
    key: Array
    keep_given: Callable[[PyTree], PyTree] = _same
    token_times: Callable[[Array], Array] = _same


def integrate_all(
    samplers: Mapping[str, FieldSampler],
    denoise: DenoiseAll,
    xts: Mapping[str, PyTree],
    times: Array,
    hints: Mapping[str, Array] | None = None,
) -> dict[str, PyTree]:
    """x by name at the last of the decreasing `times` [T + 1], from x at the first, in one loop, in at least float32.

    hints   of the first step, for fields with self-conditioning; later steps use the estimates of the step before

    A second evaluation within a step changes x of one field only; the others keep theirs at the start of the step.
    """
    return integrate_counted(samplers, denoise, xts, times, hints)[0]


def integrate_counted(
    samplers: Mapping[str, FieldSampler],
    denoise: DenoiseAll,
    xts: Mapping[str, PyTree],
    times: Array,
    hints: Mapping[str, Array] | None = None,
) -> tuple[dict[str, PyTree], Int[Array, "*B"]]:
    """The same, and the number of steps: of each row, where all step samplers can say that a row is `finished`. Then
    the loop ends with the last row; else it has all steps."""

    def body(carry: PyTree, now: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        (xts, states, hints), (number, t, s) = carry, now
        estimates = denoise(xts, t, hints)
        new = {}
        for name, one in samplers.items():

            def again(x: PyTree, time: Array, name: str = name, one: FieldSampler = one) -> PyTree:
                return denoise(xts | {name: one.keep_given(x)}, jnp.max(time), hints)[name]

            own = jax.random.fold_in(one.key, number)
            given = (estimates[name], xts[name], one.token_times(t), one.token_times(s), states[name], again)
            new[name] = one.sampler.step(one.process, own, *given)
        xts = {name: one.keep_given(new[name][0]) for name, one in samplers.items()}
        hints = {name: samplers[name].process.hint(estimates[name]) for name in hints}
        return (xts, {name: state for name, (_, state) in new.items()}, hints), None

    xts = {name: one.keep_given(min_float32(xts[name])) for name, one in samplers.items()}
    states = {name: one.sampler.init(one.process, xts[name]) for name, one in samplers.items()}
    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    start = (xts, states, dict(hints or {}))
    if not all(hasattr(one.sampler, "finished") for one in samplers.values()):
        return jax.lax.scan(body, start, steps)[0][0], jnp.asarray(len(times) - 1)

    def unfinished(carry: PyTree) -> Bool[Array, " B"]:
        """Rows that need another step."""
        done = [one.sampler.finished(one.process, carry[0][name], carry[1][name]) for name, one in samplers.items()]
        return ~functools.reduce(jnp.logical_and, done)

    def again(loop: PyTree) -> Array:
        number, carry, _ = loop
        return (number < len(times) - 1) & unfinished(carry).any()

    def step(loop: PyTree) -> PyTree:
        number, carry, taken = loop
        taken = taken + unfinished(carry)
        return number + 1, body(carry, jax.tree.map(lambda a: a[number], steps))[0], taken

    taken = unfinished(start).astype(jnp.int32) * 0
    _, (xts, *_), taken = jax.lax.while_loop(again, step, (jnp.int32(0), start, taken))
    return xts, taken


def integrate(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, times: Array) -> PyTree:
    """`integrate_all` of one field."""
    one = {"": FieldSampler(sampler, process, key)}
    return integrate_all(one, lambda xts, t, _: {"": denoise(xts[""], t)}, {"": xt}, times)[""]


def sample(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, steps: int) -> PyTree:
    """x at t = 0 from noise x_t, in `steps` steps on the sampler's time grid."""
    return integrate(sampler, process, denoise, key, xt, sampler.times(process, steps))


def min_float32(tree: PyTree) -> PyTree:
    """The tree with floats narrower than float32 as float32."""

    def one(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)
