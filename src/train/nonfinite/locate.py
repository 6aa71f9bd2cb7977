"""Finds the first NaN or infinity in the order of a step: data, parameters, codecs, corruption, first estimates of
self-conditioning, embeddings, blocks, the trunk's output, heads, losses; then gradients, from heads to embedders.

The step's forward pass is repeated with the same batch, draws and placement, and counts the bad values of each stage by
row. Gradients are not computed again: the step measured them by parameter and layer.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.common import tree
from src.common.mesh.sharding import replicated
from src.common.rng import step_key
from src.interfaces import Batch, PyTree
from src.models.model import STACKED, ModelField, Network, bind
from src.train.system import Drawn, System, draw, prepare
from src.train.trainer import Trainer

Flags = OrderedDict[tuple[str, str], Array]  # by (kind, name): number of bad values, [] or [B] or [L] or [L, B]
SHOWN = 3
KINDS = ("codec", "corruption", "first estimate", "embedding", "block", "output of the trunk", "head", "loss")
HEAD = re.compile("fields/[^/]+/head/")
BACKWARDS = ("mlp/down", "mlp/", "mlp_norm/", "attention/out", "attention/", "attention_norm/")  # within a block


class NonfiniteLocator:
    """Finds bad values in steps of one run; compiled at the first call."""

    def __init__(self, trainer: Trainer):
        self.mesh = trainer.mesh
        self._search = jax.jit(functools.partial(_forward, trainer), out_shardings=replicated(trainer.mesh))

    def locate(self, params: PyTree, batch: Mapping[str, Batch], step: int, grads: Mapping[str, Any]) -> str:
        """The first place, such as "block 3 of 4 of the trunk, in task caption_to_image, row 7"; "" if all is finite.

        step    number of the step, from 0, for its noise
        grads   sums of squares of its gradient by parameter, `[L]` in the trunk's stack (`StepMetrics.squares["grad"]`)

        Rows count from 0 in the task's global batch; blocks count from 1. Every process must call it.
        """
        with jax.set_mesh(self.mesh):
            found = jax.device_get(self._search(params, batch, step))
        bad = [(kind, name, np.asarray(count)) for (kind, name), count in found.items() if count.any()]
        blocks = [entry for entry in bad if entry[0] == "block"]
        if blocks and blocks[0] is bad[0]:  # of all tasks, the earliest block
            bad = [min(blocks, key=lambda entry: np.flatnonzero(entry[2].any(1))[0])]
        return _place(*bad[0]) if bad else first_bad_gradient(jax.device_get(dict(grads)))


def first_bad_gradient(squares: Mapping[str, Any]) -> str:
    """The parameters with a gradient that is not finite, at the first stage of the backward pass; "" if all are finite.

    squares   sums of squares by parameter, `[L]` in the trunk's stack, else `[]`
    """
    found: dict[tuple[int, int], list[tuple[int, str]]] = {}
    for path, square in squares.items():
        layers = np.flatnonzero(~np.isfinite(np.atleast_1d(square)))
        if not layers.size:
            continue
        if path.startswith(STACKED):
            inner = path.removeprefix(STACKED)
            order = next((i for i, part in enumerate(BACKWARDS) if inner.startswith(part)), len(BACKWARDS))
            found.setdefault((2, -int(layers[-1])), []).append(
                (order, f"{path}, layer {layers[-1] + 1} of {len(square)}")
            )
        else:
            stage = 0 if HEAD.match(path) else 1 if path.startswith("trunk/") else 3
            found.setdefault((stage, 0), []).append((0, path))
    if not found:
        return ""
    return f"gradient of {tree.listed([name for _, name in sorted(found[min(found)])], SHOWN)}"


def _place(kind: str, name: str, count: np.ndarray) -> str:
    """Description of one entry."""
    text = f"{kind}: {name}"
    if kind == "block":
        layer = int(np.flatnonzero(count.any(1))[0])
        text, count = f"block {layer + 1} of {len(count)} of the trunk, in {name}", count[layer]
    if not count.ndim:
        return text
    places = [str(i) for i in np.flatnonzero(count)]
    if kind == "parameter":
        return f"{text}, layer {tree.listed([str(int(i) + 1) for i in places], SHOWN)} of {len(count)}"
    return f"{text}, row {tree.listed(places, SHOWN)}"


def _bad(x: Array, axes: int = 1) -> Array:
    """Number of values that are not finite, summed over all but the first `axes` axes; 0 for integers."""
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.zeros(x.shape[:axes], jnp.int32)
    return (~jnp.isfinite(x)).astype(jnp.int32).sum(tuple(range(axes, x.ndim)))


def _forward(trainer: Trainer, params: PyTree, batch: Mapping[str, Batch], step: Array) -> Flags:
    system, placement, accumulate = trainer.system, trainer.placement, trainer.system.config.accumulate
    flags: Flags = OrderedDict()
    for task, rows in batch.items():
        values = {name: tokens.value for name, tokens in rows.tokens.items()} | rows.cond
        flags |= {("data", f"task {task}, {name}"): _bad(value) for name, value in values.items()}
    for path, leaf in tree.flatten(params).items():
        flags["parameter", path] = _bad(leaf, 1 if path.startswith(STACKED) else 0)
    sizes = {name: plan.rows for name, plan in system.tasks.items()}

    def local(params: PyTree, rows: PyTree, add: Any) -> tuple[PyTree, Flags]:
        def look(micro: PyTree) -> Flags:
            drawn, numbers = micro
            here = _network(system, bind(system.architecture, params, placement, _bad), drawn)
            whole: Flags = OrderedDict()
            for (kind, task, name), count in here.items():  # each device has its own rows
                if count.ndim:
                    count = count.reshape(*count.shape[:-1], len(numbers[task]), -1).sum(-1)  # parts of packed rows
                    empty = jnp.zeros((*count.shape[:-1], sizes[task]), jnp.int32)
                    count = empty.at[..., numbers[task]].add(count)
                whole[kind, f"task {task}{name and ', '}{name}"] = count
            return whole

        parts = jax.lax.map(look, tree.split_rows(rows, accumulate))
        return jax.tree.map(jnp.zeros_like, params), add(jax.tree.map(lambda a: a.sum(0), parts))

    numbers = {name: jnp.arange(rows) for name, rows in sizes.items()}
    drawn = draw(system, batch, step_key(system.config.seed, step))
    _, inside = placement.local(local, params, (drawn, numbers))
    for kind in KINDS:
        flags.update({key: count for key, count in inside.items() if key[0] == kind})
    return flags


def _network(system: System, net: Network, drawn: Drawn) -> OrderedDict[tuple[str, str, str], Array]:
    """Number of bad values by (kind, task, name): `[B]`, for blocks `[L, B]`, for losses `[]`."""
    flags: OrderedDict[tuple[str, str, str], Array] = OrderedDict()
    clean, _ = drawn
    views, aux = prepare(system, net, drawn)
    for task, plan in system.tasks.items():
        view = views[task]
        for name, tokens in clean[task].batch.tokens.items():
            flags["codec", task, name] = _bad(tokens.value)
        for name, leaf in view.noisy.items():
            flags["corruption", task, name] = _bad(leaf)
        for name, leaf in view.times.items():
            flags["corruption", task, f"time of {name}"] = _bad(leaf)
        for name, leaf in view.hints.items():
            flags["first estimate", task, name] = _bad(leaf)
        flags["embedding", task, ""] = _bad(net.embedded(view).x)
        hidden, (seen,) = net.run({task: view})
        flags["block", task, ""] = seen
        flags["output of the trunk", task, ""] = _bad(hidden[task].sequence)
        for label, (objective, _) in plan.objectives.items():
            noting = _Noting(**vars(net))
            terms = objective.loss(noting, hidden[task], aux[task][label])
            flags |= {("head", task, f"{label}, {name}"): count for name, count in noting.noted.items()}
            for term, value in terms.items():
                flags["loss", task, f"{label}/{term}"] = _bad(value.total, 0)
    return flags


@dataclasses.dataclass(frozen=True)
class _Noting(Network):
    """A network that counts bad outputs of the heads, by name."""

    noted: dict[str, Array] = dataclasses.field(default_factory=dict)

    def field(self, name: str) -> ModelField:
        """The field, with counted outputs."""
        return _NotedField(**vars(super().field(name)), name=name, noted=self.noted)


@dataclasses.dataclass(frozen=True)
class _NotedField(ModelField):
    """A field that counts the bad outputs of its head in `noted`, under `name`."""

    name: str = ""
    noted: dict[str, Array] = dataclasses.field(default_factory=dict)

    def __call__(self, *args: Any) -> Array:
        return self._note(super().__call__(*args))

    def nll(self, *args: Any) -> Array:
        return self._note(super().nll(*args))

    def divergence(self, *args: Any) -> Array:
        return self._note(super().divergence(*args))

    def _note(self, out: Array) -> Array:
        self.noted[self.name] = self.noted.get(self.name, 0) + _bad(out)
        return out
