"""Time grids of sampling."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from src.corruption.base import check_steps
from src.corruption.schedules import Schedule
from src.corruption.timesteps import shift_time

SPACINGS = ("uniform", "ddim", "linspace")  # of the kept indices of a discrete schedule


def _kept_indices(n: int, steps: int, spacing: str) -> np.ndarray:
    """The `steps` indices out of n that a respaced process keeps, increasing."""
    if spacing == "ddim":
        strides = [i for i in range(1, n + 1) if len(range(0, n, i)) == steps]
        if not strides:
            raise ValueError(
                f"No integer stride picks {steps} of {n} times; take another step count or spacing 'uniform'."
            )
        return np.arange(0, n, strides[0])
    most = n - 1 if spacing == "linspace" else n
    if steps > most:
        raise ValueError(f"{steps} sampling steps do not fit a process of {n} times; take at most {most}.")
    if spacing == "linspace":
        return np.round(np.linspace(0, n - 1, steps + 1)).astype(int)[1:]
    if steps == 1:
        return np.array([n - 1])  # a single step starts from noise
    # a cumulative sum of strides, because the rounding of the published code depends on it
    return np.round(np.cumsum([0.0] + [(n - 1) / (steps - 1)] * (steps - 1))).astype(int)


def time_grid(
    schedule: Schedule, steps: int, *, spacing: str = "uniform", shift: float = 1.0, last_size: float | None = None
) -> Float[Array, " T"]:
    """Decreasing times [steps + 1] that end at 0.

    Discrete schedules: t = (k + 1)/n of the kept indices k. "uniform" keeps round(i (n-1)/(steps-1)), "ddim" every
    stride-th from 0 (both as in Nichol & Dhariwal's code), "linspace" round(i (n-1)/steps) without i = 0 (that of
    diffusers' DPM-Solver). Continuous schedules: equal steps from t_max to 0, or, with `last_size`, equal steps to
    `last_size` and one from there to 0. `shift` moves times towards noise (SD3, eq. 23).

    Raises ValueError for steps < 1, an unknown spacing, or step counts that do not fit the table.
    """
    check_steps(steps)
    if spacing not in SPACINGS:
        raise ValueError(f"The spacing {spacing!r} is unknown; take one of {', '.join(SPACINGS)}.")
    n = schedule.discrete_steps
    if n is not None:
        times = (_kept_indices(n, steps, spacing)[::-1] + 1) / n
    elif last_size is not None:
        times = np.linspace(schedule.t_max, last_size, steps)
    else:
        times = np.linspace(schedule.t_max, 0.0, steps + 1)[:-1]
    return jnp.append(shift_time(jnp.asarray(times, jnp.float32), shift), 0.0)
