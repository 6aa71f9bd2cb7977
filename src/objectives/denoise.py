"""Diffusion loss of one continuous field."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from src.interfaces import Batch, Hidden, LossTerm, Net, Noised, Process, PyTree, View

QUARTERS = 4  # of diffusion time, whose losses are told apart
Corrupted = tuple[Array, Noised, Array]  # x0 [B, N, P], what `corrupt` gave, t [B, 1]


class Denoise:
    """w(t) · |prediction - target|², mean over the field, summed over rows; plus the variance's bound if it is learned.

    process    corruption process; it knows the parameterization of the target
    times      time sampler, (key, shape) -> t
    weight     loss weight, (schedule, t, parameterization) -> w(t)
    """

    def __init__(self, field: str, *, process: Process, times: Callable, weight: Callable):
        self.fields = (field,)
        self.field, self.process, self.times, self.weight = field, process, times, weight

    def prepare(self, view: View, batch: Batch, key: Array, train: bool) -> tuple[View, PyTree]:
        """Draws one time a row and noises the field."""
        time_key, noise_key = jax.random.split(key)
        x0 = view.inputs[self.field]
        t = self.times(time_key, (x0.shape[0], 1))
        noised = self.process.corrupt(noise_key, x0, t)
        view = view.replace(
            inputs=view.inputs | {self.field: noised.xt},
            times=view.times | {self.field: self.process.time_input(t)},
        )
        return view, (x0, noised, t)

    def loss(self, net: Net, hidden: Hidden, batch: Batch, aux: Corrupted) -> dict[str, LossTerm]:
        """`mse` (and `vlb`, in bits per dimension, when the variance is learned), one count a valid row.

        `mse@0.00-0.25` … are the parts of `mse` of the rows whose time lies there; they add up to it.
        """
        x0, noised, t = aux
        prediction = net.image_prediction(hidden.of(self.field), hidden.vectors[self.field])
        target = noised.targets[self.process.parameterization]
        weight = self.weight(self.process.schedule, t, self.process.parameterization)
        per_row = (weight[..., None] * (prediction.value - target) ** 2).mean(axis=(1, 2))
        valid = batch[self.field].valid if self.field in batch else None
        valid = jnp.ones(per_row.shape, bool) if valid is None else valid
        rows = valid.sum(dtype=jnp.float32)
        terms = {"mse": LossTerm(jnp.where(valid, per_row, 0).sum(), rows)}
        if self.process.variance == "learned_range":
            bound = self.process.vlb_term(x0, noised.xt, prediction, t)
            terms["vlb"] = LossTerm(jnp.where(valid, bound, 0).sum(), rows)
        return terms | by_time("mse", per_row, t[:, 0], valid)


def by_time(name: str, values: Float[Array, "B"], t: Float[Array, "B"], valid: Bool[Array, "B"]) -> dict[str, LossTerm]:
    """Sums and counts of the valid rows in each quarter of diffusion time, `name@0.00-0.25` …, none of them trained.

    A value that is not finite spoils its own quarter alone.
    """
    quarter = jnp.minimum((t * QUARTERS).astype(jnp.int32), QUARTERS - 1)  # t = 1 belongs to the last one
    terms = {}
    for i in range(QUARTERS):
        inside = valid & (quarter == i)
        total, count = jnp.where(inside, values, 0).sum(), inside.sum(dtype=jnp.float32)
        terms[f"{name}@{i / QUARTERS:.2f}-{(i + 1) / QUARTERS:.2f}"] = LossTerm(total, count, trained=False)
    return terms
