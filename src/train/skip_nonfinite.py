"""Skips steps with a loss or gradient that is not finite or, on request, with a gradient spike.

A skipped step leaves parameters, average and optimizer state (with its counts) unchanged, so the learning rate is that
of `step - skipped`; the step's number and the data go on. The guard's memory is in the train state, so that a resumed
run makes the same decisions.

A spike is a gradient norm g with  ln g - median > spike · max(1.4826 · MAD, MIN_DEVIATION),  where median and MAD (the
median distance from it) are of ln g over the last WINDOW steps taken; 1.4826 · MAD is the deviation of a normal
distribution (Hampel 1974). Mean and standard deviation would be too large after the first steps or an accepted spike.
Before the window is full there are no spikes. With spike = 6, a spike is at least e^3 = 20 times the median.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import PyTree

WINDOW = 128
MIN_DEVIATION = 0.5  # healthy gradients vary: the largest of two runs of digits were 16 and 22 times the median
COUNTS = ("skipped", "streak", "restored")


def new_guard() -> dict[str, Array]:
    """The guard's memory before the first step: number of `skipped` steps, `streak` of the last ones in a row, number
    of returns to a checkpoint (`restored`), and the last gradient norms `[WINDOW]`."""
    return {name: jnp.zeros((), jnp.int32) for name in COUNTS} | {"norms": jnp.zeros(WINDOW, jnp.float32)}


def accept_step(
    guard: Mapping[str, Array],
    step: Int[Array, ""],
    loss: Float[Array, ""],
    square: Float[Array, ""],
    spike: float,
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """Whether to take a step, and the guard's memory after it.

    step     number of the step, from 0
    square   squared global norm of the gradient; a norm above 1.8e19 overflows and is not finite
    spike    threshold in deviations; 0: no spikes
    """
    norm, taken = jnp.sqrt(square), step - guard["skipped"]
    good = jnp.isfinite(loss) & jnp.isfinite(square)
    if spike:
        good &= (taken < WINDOW) | ~is_spike(guard["norms"], norm, spike)
    skipped = guard["skipped"] + ~good
    streak = jnp.where(good, 0, guard["streak"] + 1)
    norms = guard["norms"].at[taken % WINDOW].set(jnp.where(good, norm, guard["norms"][taken % WINDOW]))
    return good, {"skipped": skipped, "streak": streak, "restored": guard["restored"], "norms": norms}


def is_spike(norms: Float[Array, "W"], norm: Float[Array, ""], spike: float) -> Bool[Array, ""]:
    """Whether a gradient norm is a spike against a full window of norms (docstring of the module)."""
    seen, new = (jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny)) for x in (norms, norm))
    middle = jnp.median(seen)
    return new - middle > spike * jnp.maximum(1.4826 * jnp.median(jnp.abs(seen - middle)), MIN_DEVIATION)


def select(good: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` if the step is taken, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
