"""Where NaN or infinity appears first, in the order in which a step computes: data, parameters, codecs, corruption, the
first estimates of self-conditioning, embeddings, each block, the trunk's output, heads, losses; then gradients, from
the heads back to the embedders.

The step's forward pass is repeated with its own batch, draws and placement, and every stage leaves how many of its
values are bad in each row. Gradients are not computed again: the step has measured them by parameter and layer.
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


class Finder:
    """Searches the steps of one run; compiled at the first search."""

    def __init__(self, trainer: Trainer):
        self.mesh = trainer.mesh
        self._search = jax.jit(functools.partial(_forward, trainer), out_shardings=replicated(trainer.mesh))

    def find(self, params: PyTree, batch: Mapping[str, Batch], step: int, grads: Mapping[str, Any]) -> str:
        """The first place, such as "block 3 of 4 of the trunk, in task caption_to_image, row 7"; "" when there is none.

        step    the number of the step, from 0; its noise is drawn again
        grads   sums of squares of its gradient by parameter, `[L]` in the trunk's stack (`StepMetrics.squares["grad"]`)

        Rows are those of the task's global batch, from 0; blocks count from 1. Every process must call it.
        """
        with jax.set_mesh(self.mesh):
            found = jax.device_get(self._search(params, batch, step))
        bad = [(kind, name, np.asarray(count)) for (kind, name), count in found.items() if count.any()]
        blocks = [entry for entry in bad if entry[0] == "block"]
        if blocks and blocks[0] is bad[0]:  # the other tasks' blocks stand behind all of the first task's
            bad = [min(blocks, key=lambda entry: np.flatnonzero(entry[2].any(1))[0])]
        return _place(*bad[0]) if bad else first_bad_gradient(jax.device_get(dict(grads)))


def first_bad_gradient(squares: Mapping[str, Any]) -> str:
    """The parameters whose gradient is not finite where the backward pass meets them first; "" when all are finite.

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
    """One entry in words."""
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
    """Number of values that are not finite, whatever lies behind the first axes added up; whole numbers are fine."""
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
            for (kind, task, name), count in here.items():  # every device knows its own rows
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
    """Bad values by (kind, task, name): `[B]` of the rows given, `[L, B]` of the blocks, `[]` of the losses."""
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
    """A network that notes what the heads give, by name."""

    noted: dict[str, Array] = dataclasses.field(default_factory=dict)

    def field(self, name: str) -> ModelField:
        """The row with a head that is listened to."""
        return _NotedField(**vars(super().field(name)), name=name, noted=self.noted)


@dataclasses.dataclass(frozen=True)
class _NotedField(ModelField):
    """A row whose head's outputs are counted in `noted`, under `name`."""

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
