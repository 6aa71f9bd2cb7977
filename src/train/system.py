"""A system: architecture, tasks with weighted objectives, and the forward pass that they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from src.codecs.chain import encoded
from src.common.mesh.fsdp import Placement
from src.common.rng import stream
from src.interfaces import Batch, Field, Hidden, Layout, LossTerm, Net, Objective, PyTree, Task, View, row_of
from src.models.model import Architecture, bind
from src.train.encode_batch import Encoders
from src.train.init_from import InitFrom


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """One task of a system: data, layout with leads, rows in a batch, and objectives with weights."""

    task: Task
    layout: Layout
    rows: int
    objectives: Mapping[str, tuple[Objective, float]]


@dataclasses.dataclass(frozen=True)
class System:
    """A system built from one config (`src/build.py`).

    fields        by name
    architecture  the model without parameters
    init          key -> parameters, a nested dict of arrays
    pipeline      for sampling, without parameters
    evaluators    by name, called as `evaluator(pipeline, seed)`; see `src/evals/result.py`
    encoders      frozen networks
    init_from     reads initial parameters, or None
    """

    config: Any
    fields: Mapping[str, Field]
    architecture: Architecture
    init: Callable[[Array], PyTree]
    tasks: Mapping[str, TaskPlan]
    pipeline: Any = None
    evaluators: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    encoders: Encoders = dataclasses.field(default_factory=Encoders)
    init_from: InitFrom | None = None

    def identity(self) -> dict[str, Any]:
        """The JSON values that identify the system in a checkpoint: config, fingerprints of the codecs, and hash of the
        initial weights."""
        codecs = {name: field.codec.fingerprint for name, field in self.fields.items()}
        codecs = {name: prints for name, prints in codecs.items() if prints}
        return self.config.to_dict() | {"codecs": codecs, "weights": self.init_from.hash() if self.init_from else None}

    def spec(self) -> dict[str, Batch]:
        """Abstract arrays of one global batch for the train step."""
        return self.encoders.spec(self.raw_spec())

    def raw_spec(self) -> dict[str, Batch]:
        """Abstract arrays of one global batch of raw data."""
        return {name: plan.task.element_spec(plan.rows) for name, plan in self.tasks.items()}

    def encoder_bytes(self) -> int:
        """Bytes of the frozen encoders on each device; published sizes for those whose folders are missing."""
        encoders, _ = self.encoders.sketch()
        needed = encoders.needed(encoders.shapes(), self.raw_spec())
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(needed))

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of each task."""
        return {name: plan.layout for name, plan in self.tasks.items()}

    @property
    def weights(self) -> dict[str, float]:
        """Weight by "task/objective"."""
        return {f"{t}/{o}": w for t, plan in self.tasks.items() for o, (_, w) in plan.objectives.items()}


Drawn = tuple[dict[str, View], dict[str, dict[str, PyTree]]]  # clean views and draws, by task


def draw(system: System, batch: Mapping[str, Batch], key: Array) -> Drawn:
    """Clean views of the whole batch, and the random draws of its objectives; needs no parameters."""
    views = {name: clean_view(system.fields, plan.layout, batch[name]) for name, plan in system.tasks.items()}
    draws = {
        name: {
            label: objective.draw(stream(key, f"{name}/{label}"), system.fields, views[name])
            for label, (objective, _) in plan.objectives.items()
        }
        for name, plan in system.tasks.items()
    }
    return views, draws


def clean_view(fields: Mapping[str, Field], layout: Layout, batch: Batch) -> View:
    """The rows of a task after the device links of their codecs, with zeros for padding of vectors.

    Raises KeyError when the batch lacks a name of the layout.
    """
    missing = [name for segment in layout.segments for name in segment.names if name not in batch.tokens]
    if missing:
        raise KeyError(f"the batch has {sorted(batch.tokens)}, the layout also needs {missing}")
    tokens = {name: encoded(fields[row_of(name)].codec, value) for name, value in batch.tokens.items()}
    return View(batch.replace(tokens=tokens), layout)


def prepare(system: System, net: Net, drawn: Drawn) -> Drawn:
    """What every objective of every task makes of its rows, and what the losses need later."""
    views, draws = drawn
    prepared, aux = {}, {}
    for name, plan in system.tasks.items():
        view, aux[name] = views[name], {}
        for label, (objective, _) in plan.objectives.items():
            view, aux[name][label] = objective.prepare(net, view, draws[name][label])
        prepared[name] = view
    return prepared, aux


def losses(system: System, params: PyTree, drawn: Drawn, placement: Placement | None = None) -> dict[str, LossTerm]:
    """One shared forward pass, then the terms of every objective, by "task/objective/term"."""
    net = bind(system.architecture, params, placement)
    with jax.named_scope("prepare"):
        views, aux = prepare(system, net, drawn)
    return terms_of(system, net, net.hidden(views), aux)


def terms_of(
    system: System, net: Net, hidden: Mapping[str, Hidden], aux: Mapping[str, Mapping[str, PyTree]]
) -> dict[str, LossTerm]:
    """The terms of every objective for these hidden states."""
    terms = {}
    for name, plan in system.tasks.items():
        for label, (objective, _) in plan.objectives.items():
            with jax.named_scope("losses"), jax.named_scope(f"{name}.{label}"):
                found = objective.loss(net, hidden[name], aux[name][label])
            terms |= {f"{name}/{label}/{term}": value for term, value in found.items()}
    return terms


def weighted_sum(system: System, terms: Mapping[str, LossTerm], counts: Mapping[str, Array]) -> Array:
    """total = Σ weight · (sum of the term / its count); a term with count 0 adds 0."""
    weights, total = system.weights, 0
    for name, term in terms.items():
        if term.trained:
            mean = jnp.where(counts[name] > 0, term.total / jnp.maximum(counts[name], 1), 0)
            total = total + weights["/".join(name.split("/")[:2])] * mean
    return total
