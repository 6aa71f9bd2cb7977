"""A system: the model's graph, the tasks with their weighted objectives, and the forward pass they share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from src.common.mesh.fsdp import Placement
from src.common.rng import stream
from src.interfaces import Batch, LossTerm, Objective, PyTree, Task, View
from src.models.model import bind
from src.models.transformer import Tap
from src.sequence.layout import Layout
from src.sequence.view import clean_view
from src.train.encode_batch import NOTHING, Frozen
from src.train.init_from import Start


@dataclasses.dataclass(frozen=True)
class TaskPlan:
    """One task of a system: its data, the layout the model uses, rows per batch, and objectives with their weights."""

    task: Task
    layout: Layout
    rows: int
    objectives: Mapping[str, tuple[Objective, float]]


@dataclasses.dataclass(frozen=True)
class System:
    """All of it, built from one config (`src/build.py`).

    graph       the model without its parameters
    init        key -> parameters, a nested dict of arrays
    encode      device codec of the images: `[B, h, w, C]` -> patches `[B, N, P]`
    evaluators  by name, called as `evaluator(predictor, seed)`; see `src/evals/result.py`
    predictor   samples from the system, once it is given parameters
    codec       the text codec, or None
    frozen      networks that are used and not trained
    start       where the first parameters come from, or None
    """

    config: Any
    graph: nnx.GraphDef
    init: Callable[[Array], PyTree]
    tasks: Mapping[str, TaskPlan]
    encode: Callable[[Array], Array]
    evaluators: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    predictor: Any = None
    codec: Any = None
    frozen: Frozen = NOTHING
    start: Start | None = None

    def identity(self) -> dict[str, Any]:
        """What a checkpoint remembers of the system: the config, which tokenizer and frozen networks gave ids and
        latents their meaning, and the hash of the weights that it began from."""
        tokenizer = self.codec.fingerprint() if self.codec else None
        known = {"tokenizer": tokenizer, "frozen": self.frozen.fingerprints()}
        return self.config.to_dict() | known | {"weights": self.start.hash() if self.start else None}

    def spec(self) -> dict[str, dict[str, Any]]:
        """Abstract arrays of one global batch, as the step gets it."""
        return self.frozen.spec(self.layouts, self.delivered())

    def delivered(self) -> dict[str, dict[str, Any]]:
        """Abstract arrays of one global batch, as the data deliver it."""
        return {name: plan.task.element_spec(plan.rows) for name, plan in self.tasks.items()}

    def frozen_bytes(self) -> int:
        """Bytes of the frozen networks on every device; without their folders they are taken to be as published."""
        frozen, _ = self.frozen.sketch()
        needed = frozen.needed(frozen.shapes(), self.layouts, self.delivered())
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(needed))

    @property
    def layouts(self) -> dict[str, Layout]:
        """The layout of each task."""
        return {name: plan.layout for name, plan in self.tasks.items()}

    @property
    def weights(self) -> dict[str, float]:
        """Weight by "task/objective"."""
        return {f"{t}/{o}": w for t, plan in self.tasks.items() for o, (_, w) in plan.objectives.items()}


Prepared = tuple[dict[str, View], dict[str, dict[str, PyTree]]]


def prepare(system: System, batch: Mapping[str, Batch], key: Array, train: bool) -> Prepared:
    """Every objective of every task corrupts its fields: views of what the network sees, and what losses need later."""
    views, aux = {}, {}
    for name, plan in system.tasks.items():
        view, aux[name] = clean_view(plan.layout, batch[name], system.encode), {}
        for term, (objective, _) in plan.objectives.items():
            view, aux[name][term] = objective.prepare(view, batch[name], stream(key, f"{name}/{term}"), train)
        views[name] = view
    return views, aux


def losses(
    system: System,
    params: PyTree,
    batch: Mapping[str, Batch],
    prepared: Prepared,
    placement: Placement | None = None,
    tap: Tap | None = None,
) -> dict[str, LossTerm]:
    """One shared forward pass, then the terms of every objective, by "task/objective/term"."""
    views, aux = prepared
    net = bind(system.graph, params, placement, tap)
    hidden = net.hidden({name: (system.tasks[name].layout, view) for name, view in views.items()})
    terms = {}
    for name, plan in system.tasks.items():
        for label, (objective, _) in plan.objectives.items():
            for term, value in objective.loss(net, hidden[name], batch[name], aux[name][label]).items():
                terms[f"{name}/{label}/{term}"] = value
    return terms


def weighted_sum(system: System, terms: Mapping[str, LossTerm], counts: Mapping[str, Array]) -> Array:
    """total = Σ weight · (sum of the term / its count); a term that counts nothing adds nothing."""
    weights = system.weights
    return sum(
        weights[name.rsplit("/", 1)[0]]
        * jax.numpy.where(counts[name] > 0, term.total / jax.numpy.maximum(counts[name], 1), 0)
        for name, term in terms.items()
        if term.trained
    )
