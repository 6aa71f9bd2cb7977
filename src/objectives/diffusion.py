"""Diffusion loss of one continuous field."""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from src.interfaces import Batch, Hidden, LossTerm, Net, Noised, Process, PyTree, View

QUARTERS = 4  # of diffusion time, whose losses are told apart
Corrupted = tuple[Array, Noised, Array]  # x0 [B, N, P], what `corrupt` gave, t [B, 1]; of packed rows [B, M, …] each


class Diffusion:
    """w(t) · |prediction - target|², mean over the field, summed over rows; plus the variance's bound if it is learned.

    process    corruption process; it knows the parameterization of the target
    times      time sampler, (key, shape) -> t
    weight     loss weight, (schedule, t, parameterization) -> w(t)
    """

    def __init__(self, field: str, *, process: Process, times: Callable, weight: Callable):
        self.fields = (field,)
        self.field, self.process, self.times, self.weight = field, process, times, weight

    def prepare(self, view: View, batch: Batch, key: Array, train: bool) -> tuple[View, PyTree]:
        """Draws one time an image, which is one a row unless rows are packed, and noises the field."""
        time_key, noise_key = jax.random.split(key)
        x0 = view.inputs[self.field]
        images = x0.shape[:-2]
        t = self.times(time_key, (math.prod(images), 1))
        noised = self.process.corrupt(noise_key, x0.reshape(-1, *x0.shape[-2:]), t)
        noised, t = jax.tree.map(lambda a: a.reshape(*images, *a.shape[1:]), (noised, t))
        view = view.replace(
            inputs=view.inputs | {self.field: noised.xt},
            times=view.times | {self.field: self.process.time_input(t).reshape(images[0], -1)},
        )
        return view, (x0, noised, t)

    def loss(self, net: Net, hidden: Hidden, batch: Batch, aux: Corrupted) -> dict[str, LossTerm]:
        """`mse` (and `vlb`, in bits per dimension, when the variance is learned), one count a valid image.

        `mse@0.00-0.25` … are the parts of `mse` of the images whose time lies there; they add up to it.
        """
        axes = aux[0].ndim - 2  # of images: rows, or rows and the images in each
        x0, noised, t = jax.tree.map(lambda a: a.reshape(-1, *a.shape[axes:]), aux)
        states, vectors = hidden.of(self.field), hidden.vectors[self.field]
        prediction = net.image_prediction(
            states.reshape(-1, *states.shape[-2:]), vectors.reshape(len(x0), -1, vectors.shape[-1])
        )
        target = noised.targets[self.process.parameterization]
        weight = self.weight(self.process.schedule, t, self.process.parameterization)
        each = (weight[..., None] * (prediction.value - target) ** 2).mean(axis=(1, 2))
        valid = batch[self.field].valid if self.field in batch else None
        valid = jnp.ones(each.shape, bool) if valid is None else valid.reshape(-1)
        images = valid.sum(dtype=jnp.float32)
        terms = {"mse": LossTerm(jnp.where(valid, each, 0).sum(), images)}
        if self.process.variance == "learned_range":
            bound = self.process.vlb_term(x0, noised.xt, prediction, t)
            terms["vlb"] = LossTerm(jnp.where(valid, bound, 0).sum(), images)
        return terms | by_time("mse", each, t[:, 0], valid)


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
