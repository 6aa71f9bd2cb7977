"""Where NaN or infinity appears first, in the order in which a step computes: data, parameters, what is made of the
data, embeddings, each block, the trunk's output, heads, losses; then gradients, from the heads back to the embedders.

The step's forward pass is repeated with its own batch, corruption and placement, and every stage leaves how many of its
values are bad in each row. Gradients are not computed again: the step has measured them by parameter and layer.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from src.common import tree
from src.common.mesh.sharding import replicated
from src.common.rng import step_key
from src.interfaces import Batch, Net, PyTree
from src.models.model import STACKED, bind
from src.models.transformer import Tap
from src.train.system import Prepared, System, prepare
from src.train.trainer import Trainer

Flags = OrderedDict[tuple[str, str], Array]  # by (kind, name): number of bad values, [] or [B] or [L] or [L, B]
SHOWN = 3
HEADS = ("text_head/", "image_head/")
BACKWARDS = ("mlp/down", "mlp/", "mlp_norm/", "attention/out", "attention/", "attention_norm/")  # within a block


class Finder:
    """Searches the steps of one run; compiled at the first search."""

    def __init__(self, trainer: Trainer):
        self.mesh = trainer.mesh
        self._search = jax.jit(functools.partial(_forward, trainer), out_shardings=replicated(trainer.mesh))

    def find(self, params: PyTree, batch: Mapping[str, Batch], step: int, grads: Mapping[str, Array]) -> str:
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
            stage = 0 if path.startswith(HEADS) else 1 if path.startswith("trunk/") else 3
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
    for path, leaf in tree.flatten(dict(batch)).items():
        task, field, *_ = path.split("/")
        key = ("data", f"task {task}, field {field}")
        flags[key] = flags.get(key, 0) + _bad(leaf)
    for path, leaf in tree.flatten(params).items():
        flags["parameter", path] = _bad(leaf, 1 if path.startswith(STACKED) else 0)
    prepared = prepare(system, batch, step_key(system.config.seed, step), True)
    for task, view in prepared[0].items():
        for path, leaf in tree.flatten({"input": view.inputs, "time": view.times}).items():
            flags["corruption or codec", f"task {task}, {path.replace('/', ' ')}"] = _bad(leaf)

    sizes = {name: plan.rows for name, plan in system.tasks.items()}

    def local(params: PyTree, rows: PyTree, add: Any) -> tuple[PyTree, Flags]:
        def look(micro: PyTree) -> Flags:
            batch, prepared, numbers = micro
            here = _network(system, bind(system.graph, params, placement, tap := Tap(_bad)), tap, batch, prepared)
            whole: Flags = OrderedDict()
            for (kind, task, name), count in here.items():  # every device knows its own rows
                if count.ndim:
                    count = count.reshape(*count.shape[:-1], len(numbers[task]), -1).sum(-1)  # images of packed rows
                    empty = jnp.zeros((*count.shape[:-1], sizes[task]), jnp.int32)
                    count = empty.at[..., numbers[task]].add(count)
                whole[kind, f"task {task}{name and ', '}{name}"] = count
            return whole

        parts = jax.lax.map(look, tree.split_rows(rows, accumulate))
        return jax.tree.map(jnp.zeros_like, params), add(jax.tree.map(lambda a: a.sum(0), parts))

    numbers = {name: jnp.arange(rows) for name, rows in sizes.items()}
    _, inside = placement.local(local, params, (batch, prepared, numbers))
    for kind in ("embedding", "block", "output of the trunk", "head", "loss"):
        flags.update({key: count for key, count in inside.items() if key[0] == kind})
    return flags


def _network(
    system: System, net: Any, tap: Tap, batch: Mapping[str, Batch], prepared: Prepared
) -> OrderedDict[tuple[str, str, str], Array]:
    """Bad values by (kind, task, name): `[B]` of the rows given, `[L, B]` of the blocks, `[]` of the losses."""
    views, aux = prepared
    flags: OrderedDict[tuple[str, str, str], Array] = OrderedDict()
    for task, plan in system.tasks.items():
        flags["embedding", task, ""] = _bad(net.embedded(plan.layout, views[task]))
        hidden = net.hidden({task: (plan.layout, views[task])})[task]
        flags["block", task, ""] = tap.left.pop()
        flags["output of the trunk", task, ""] = _bad(hidden.sequence)
        for label, (objective, _) in plan.objectives.items():
            heard = _Heads(net)
            terms = objective.loss(heard, hidden, batch[task], aux[task][label])
            flags |= {("head", task, f"{label}, {name}"): count for name, count in heard.heard.items()}
            for term, value in terms.items():
                flags["loss", task, f"{label}/{term}"] = _bad(value.total, 0)
    return flags


class _Heads:
    """A net that notes what its heads give."""

    def __init__(self, net: Net):
        self.heard: dict[str, Array] = {}
        for name in (name for name in vars(Net) if not name.startswith("_")):  # its own, which a Protocol looks for
            setattr(self, name, functools.partial(self._call, name, getattr(net, name)))
        self.teacher = net.teacher  # a net and no head

    def _call(self, name: str, method: Callable[..., Any], *args: Any) -> Any:
        out = method(*args)
        counts = [_bad(leaf) for leaf in jax.tree.leaves(out) if leaf.ndim]
        self.heard[name.replace("_", " ")] = self.heard.get(name.replace("_", " "), 0) + sum(counts)
        return out
