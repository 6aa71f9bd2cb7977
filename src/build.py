"""From a config to a system: every group with a name becomes a part, and the parts are put together."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from src.codecs.chain import build_chain
from src.common.files.paths import all_at_home
from src.common.lookup import build, lookup, telling
from src.common.runtime.config_check import check_numbers
from src.common.runtime.config_keys import check_keys
from src.data.pipeline.stream import split_batch
from src.data.samples import samples_for
from src.data.task import SourceTask
from src.interfaces import Field, row_of
from src.models.build import build_architecture
from src.objectives._fit import check_hints, check_objectives
from src.sampling.pipeline import build_pipeline
from src.train.encode_batch import Encoders
from src.train.init_from import make_init_from
from src.train.system import System, TaskPlan


def build_system(config: Any) -> System:
    """Everything that a run needs except devices and parameters. Cheap: no parameter is allocated.

    Raises ValueError, in one sentence, for unknown names and for combinations that mean nothing.
    """
    rows = rows_of(config)
    all_at_home(config)
    sources = {n: build("data/sources", c.source, where=f"tasks.{n}.source") for n, c in config.tasks.items()}
    fields = {n: build_field(n, c, samples_for(n, sources)) for n, c in config.fields.items()}
    architecture, init = build_architecture(config.model.to_dict(), config.fields.to_dict(), fields)
    fields = architecture.table
    tasks = {}
    for name, group in config.tasks.items():
        template = build("data/templates", group.template, where=f"tasks.{name}.template")
        with telling(f"tasks.{name}.template", group.template):
            tasks[name] = SourceTask(name, sources[name], template, fields)
    nets = {n: field.codec.frozen for n, field in fields.items() if field.codec.frozen is not None}
    buckets = {n: task.buckets for n, task in tasks.items() if task.buckets is not None}
    plans = {n: build_plan(n, config, tasks[n], rows[n], fields) for n in tasks}
    check_hints([o for plan in plans.values() for o, _ in plan.objectives.values()], fields)
    encoders = Encoders(nets, buckets)
    pipeline = build_pipeline(config, architecture, plans, encoders)
    evaluators = {
        n: build("evals", c, where=f"eval.evaluators.{n}", tasks=tasks) for n, c in config.eval.evaluators.items()
    }
    return System(config, fields, architecture, init, plans, pipeline, evaluators, encoders, make_init_from(config))


def rows_of(config: Any) -> dict[str, int]:
    """Rows of each task in a batch. Raises ValueError for a config with unknown keys or numbers that mean nothing."""
    check_keys(config)
    check_numbers(config)
    return split_batch(config.batch, {n: c.weight for n, c in config.tasks.items()}, multiple=1)


def build_field(name: str, group: Any, samples: Any) -> Field:
    """A row of the table. Raises ValueError for parts that do not fit."""
    where = f"fields.{name}"
    codec = build_chain(group.codec, f"{where}.codec", samples)
    process, step, spec = None, None, codec.spec
    if group.get("learned"):  # the process corrupts its ids
        spec = dataclasses.replace(spec, vocab=group.learned.codes, features=None)
    if group.get("process"):
        process = build("corruption", group.process, where=f"{where}.process", field=spec)
    if group.get("step"):
        step = build("sampling/steps", group.step, where=f"{where}.step")
    flags = {key: group[key] for key in ("hint", "timed", "time_token") if key in group}
    return Field(name, codec.spec, codec, process, step, learned=bool(group.get("learned")), **flags)


def build_plan(name: str, config: Any, task: SourceTask, rows: int, fields: Mapping[str, Field]) -> TaskPlan:
    """A task with its objectives, and its layout with the time tokens that the conditioning makes.

    Raises ValueError when there is no objective, or one does not fit (`check_objectives`).
    """
    objectives = {}
    for label, group in config.tasks[name].objectives.items():
        options = {key: group[key] for key in group if key != "weight"}
        objective = build("objectives", options, where=f"tasks.{name}.objectives.{label}")
        objectives[label] = objective, float(group.weight)
    if not objectives:
        raise ValueError(f"tasks.{name}.objectives is empty; nothing would be learned from the task")
    check_objectives(f"tasks.{name}.objectives", task.layout, {n: o for n, (o, _) in objectives.items()}, fields)
    timed = any(field.process is not None and field.timed for field in fields.values())
    tokens = lookup("models", config.model.conditioning.name).tokens if timed else 0
    # Nothing stands between what is predicted token by token and the state before it.
    predicted = {n for o, _ in objectives.values() if getattr(o, "predicts_next", False) for n in o.names}
    led = lambda s: fields[row_of(s.name)].time_token and not predicted.intersection(s.names)
    layout = task.layout.with_leads(lambda s: tokens if led(s) else 0)
    return TaskPlan(task, layout, rows, objectives)
