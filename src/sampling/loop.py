"""The loop of reverse steps: of one field, or of several that share their tokens and their time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.interfaces import Process, PyTree, StepSampler

Denoise = Callable[[PyTree, Array], PyTree]  # (x_t, scalar t) -> the process's estimate
# (x_t by name, scalar t, what self-conditioning shows by name) -> estimates by name
DenoiseAll = Callable[[dict[str, PyTree], Array, dict[str, Array]], dict[str, PyTree]]


def _same(x: PyTree) -> PyTree:
    return x


@dataclasses.dataclass(frozen=True)
class Course:
    """What a loop knows of one field.

    key   of its steps, which is folded with their numbers
    pin   x_t -> x_t with the given tokens as they are
    at    scalar time -> that of each token, where some are given and keep time 0
    """

    sampler: StepSampler
    process: Process
    key: Array
    pin: Callable[[PyTree], PyTree] = _same
    at: Callable[[Array], Array] = _same


def integrate_all(
    courses: Mapping[str, Course],
    denoise: DenoiseAll,
    xts: Mapping[str, PyTree],
    times: Array,
    hints: Mapping[str, Array] | None = None,
) -> dict[str, PyTree]:
    """x by name at the last of the decreasing `times` [T + 1], from x at the first, as one scan. Floats are carried in
    float32 or wider.

    hints   of the fields that have some, at the first step; then each step has those of the step before

    A second evaluation of a field within a step has the others where the step began.
    """

    def body(carry: PyTree, now: tuple[Array, Array, Array]) -> tuple[PyTree, None]:
        (xts, states, hints), (number, t, s) = carry, now
        estimates = denoise(xts, t, hints)
        new = {}
        for name, course in courses.items():

            def again(x: PyTree, time: Array, name: str = name, course: Course = course) -> PyTree:
                return denoise(xts | {name: course.pin(x)}, jnp.max(time), hints)[name]

            own = jax.random.fold_in(course.key, number)
            given = (estimates[name], xts[name], course.at(t), course.at(s), states[name], again)
            new[name] = course.sampler.step(course.process, own, *given)
        xts = {name: course.pin(new[name][0]) for name, course in courses.items()}
        hints = {name: courses[name].process.hint(estimates[name]) for name in hints}
        return (xts, {name: state for name, (_, state) in new.items()}, hints), None

    xts = {name: course.pin(wide(xts[name])) for name, course in courses.items()}
    states = {name: course.sampler.init(course.process, xts[name]) for name, course in courses.items()}
    steps = (jnp.arange(len(times) - 1), times[:-1], times[1:])
    return jax.lax.scan(body, (xts, states, dict(hints or {})), steps)[0][0]


def integrate(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, times: Array) -> PyTree:
    """`integrate_all` of one field."""
    one = {"": Course(sampler, process, key)}
    return integrate_all(one, lambda xts, t, _: {"": denoise(xts[""], t)}, {"": xt}, times)[""]


def sample(sampler: StepSampler, process: Process, denoise: Denoise, key: Array, xt: PyTree, steps: int) -> PyTree:
    """x at t = 0 from noise x_t in `steps` steps on the sampler's own time grid."""
    return integrate(sampler, process, denoise, key, xt, sampler.times(process, steps))


def wide(tree: PyTree) -> PyTree:
    """Floats in float32 or wider."""

    def one(x: Array) -> Array:
        return x.astype(jnp.promote_types(x.dtype, jnp.float32)) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(one, tree)
