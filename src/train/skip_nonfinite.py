"""Steps that would spoil the parameters are not taken.

A step whose loss or gradient is not finite (or, on request, whose gradient is a spike) leaves parameters, their average
and all of the optimizer's state as they were, its counts too: to the optimizer that step never was, so the learning
rate is that of `step - skipped`. The step's number and the data go on. What this needs to know lies in the state, so a
resumed run decides as it would have decided.

A spike is a gradient norm g with  ln g - median > spike · max(1.4826 · MAD, LEAST),  where median and MAD (the median
distance from it) are of ln g over the last WINDOW steps that were taken; 1.4826 · MAD is the deviation of a normal
distribution (Hampel 1974). Mean and deviation would be wide after the first steps, whose gradients are large, or after
one spike that was let in. Until the window is full, nothing is a spike. With spike = 6, one is at least e^3 = 20 times
the median.
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from src.interfaces import PyTree

WINDOW = 128
LEAST = 0.5  # healthy gradients come in bursts: the largest of two runs of digits were 16 and 22 times the median
COUNTS = ("skipped", "streak", "restored")


def fresh() -> dict[str, Array]:
    """What the guard knows before the first step: steps `skipped` in all, how many of them were the last ones in a row
    (`streak`), how often the run went back to a checkpoint (`restored`), and the last gradient norms `[WINDOW]`."""
    return {name: jnp.zeros((), jnp.int32) for name in COUNTS} | {"norms": jnp.zeros(WINDOW, jnp.float32)}


def judge(
    guard: Mapping[str, Array],
    step: Int[Array, ""],
    loss: Float[Array, ""],
    square: Float[Array, ""],
    spike: float,
) -> tuple[Bool[Array, ""], dict[str, Array]]:
    """Whether a step may be taken, and what the guard knows after it.

    step     number of the step, from 0, as `guard` counts them
    square   the squared global norm of the gradient; one that overflows (a norm above 1.8e19) is not finite
    spike    deviations that make a spike; 0: nothing is one
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
    """Whether a gradient norm lies more than `spike` deviations above those of a full window (see the top)."""
    seen, new = (jnp.log(jnp.maximum(x, jnp.finfo(jnp.float32).tiny)) for x in (norms, norm))
    middle = jnp.median(seen)
    return new - middle > spike * jnp.maximum(1.4826 * jnp.median(jnp.abs(seen - middle)), LEAST)


def choose(good: Bool[Array, ""], new: PyTree, old: PyTree) -> PyTree:
    """`new` where the step is taken, else `old`."""
    return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)
