"""Sampling from a trained model: incomplete examples in, generated values out."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array

from src.codecs.chain import encoded
from src.common.files.paths import shown
from src.common.lookup import build, check_arguments
from src.common.mesh.distributed import to_host
from src.common.mesh.fsdp import Placement
from src.common.rng import stream
from src.common.runtime import stopping
from src.interfaces import Batch, Field, Layout, Net, PyTree, Task, View, row_of
from src.sampling.frozen_links import FrozenLinks
from src.sampling.guidance import Guidance
from src.sampling.raw_values import decoded
from src.sampling.rows import abstract, chunk, mesh_of, put, resized, specs_of
from src.sampling.walk import Decoder, SamplingPlan, Walk, fill, plan_of


@dataclasses.dataclass(frozen=True)
class _Program:
    """The static arguments of a compiled call.

    specs   PartitionSpecs of the parameters by path; empty: replicated
    """

    bind: Callable[[PyTree, Placement | None], Net]
    dtype: Any
    layout: Layout
    plan: SamplingPlan
    decoders: tuple[tuple[str, Decoder], ...]
    guidance: Guidance
    specs: tuple[tuple[str, PartitionSpec], ...] = ()


@dataclasses.dataclass(frozen=True)
class _Request:
    """Rows to complete, on the host; `null`: the same without conditions, None: no guidance."""

    program: _Program
    batch: Batch
    null: Batch | None


@dataclasses.dataclass(frozen=True, eq=False)
class Pipeline:
    """The parts of a system for sampling; it needs parameters (`with_params`).

    bind        (parameters, placement) -> network
    fields      by name
    tasks       by name
    leads       number of lead tokens of a segment, by (task, name)
    decoders    by field; a segment uses that of its first name
    batch_size  rows of one call, at most. Fewer are filled up to a power of two, so that few programs serve all. Rows
                are sharded over the mesh axes `data` and `fsdp` of the parameters; results do not depend on the number
                of devices
    dtype       of the computation
    params      parameters, with the states of adaptive processes (`models/model.py`: bind)
    """

    bind: Callable[[PyTree, Placement | None], Net]
    fields: Mapping[str, Field]
    tasks: Mapping[str, Task]
    leads: Mapping[tuple[str, str], int]
    decoders: Mapping[str, Decoder]
    guidance: Guidance
    batch_size: int
    dtype: Any
    frozen: FrozenLinks
    params: PyTree = None

    def with_params(self, params: PyTree) -> Pipeline:
        """The pipeline with these parameters."""
        return dataclasses.replace(self, params=params)

    def __call__(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        seed: int,
        scale: float | None = None,
        decoders: Mapping[str, Decoder] | None = None,
    ) -> list[dict[str, Any]]:
        """Generated values of each example by name ("image", "text.caption"), in the form of the source: pixels uint8
        [h, w, C]; of a text, the new part.

        given     incomplete examples; the values that they have are given (`data/task.py`)
        scale     of guidance, in place of the config's; 1: no guidance
        decoders  by field, in place of the config's

        Raises ValueError for examples that do not fit the task, or that are complete.
        """
        made = self.values(task, given, seed, scale, decoders)
        hosts = {name: self.fields[row_of(name)].codec.host for name in made}
        made = {name: [_raw(hosts[name], v) for v in values] for name, values in made.items()}
        return [dict(zip(made, row, strict=True)) for row in zip(*made.values(), strict=True)]

    def values(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        seed: int,
        *more: Any,
        **options: Any,
    ) -> dict[str, Any]:
        """The same by name, before the host link's `decode`: images float32 [n, h, w, C] about in [-1, 1], or a list if
        shapes differ; texts as lists of ids."""
        return self.counted(task, given, seed, *more, **options)[0]

    def counted(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        seed: int,
        scale: float | None = None,
        decoders: Mapping[str, Decoder] | None = None,
    ) -> tuple[dict[str, Any], np.ndarray]:
        """`values`, and how many passes of the network each row needed, [n]."""
        request, mesh = self._request(task, given, scale, decoders), mesh_of(self.params)
        name, count, parts, calls = request.program.plan.made[0], len(given), [], []
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            for number, size in enumerate(self.sizes(count)):
                stopping.check()
                start = number * self.batch_size
                rows = put(chunk((request.batch, request.null), start, size, mesh), mesh)
                key = np.uint32(seed), np.int32(start)
                part, needed = _fill(request.program, name, self.params, *rows, *key)
                parts.append({n: to_host(v)[:size] for n, v in part.items()})
                calls.append(
                    np.broadcast_to(to_host(needed), (size,)) if not np.ndim(needed) else to_host(needed)[:size]
                )
        tokens = {n: np.concatenate([part[n] for part in parts])[:count] for n in request.program.plan.made}
        frozen = lambda row, values: self.frozen.decode(row, values, mesh)
        rows = request.batch.tokens
        values = {n: decoded(self.fields[row_of(n)], value, rows[n], frozen) for n, value in tokens.items()}
        return values, np.concatenate(calls)[:count]

    def sizes(self, count: int) -> list[int]:
        """Rows of each call of the network that `count` rows need. The noise of a row is the same in all sizes."""
        if count >= self.batch_size:
            return [self.batch_size] * -(-count // self.batch_size)  # the last one, too: no second program
        return [min(self.batch_size, 1 << (count - 1).bit_length())]

    def check(self, task: str, given: Sequence[Mapping[str, Any]]) -> None:
        """Raises the errors of a call with these examples, without parameters or frozen networks."""
        self._planned(task, given, self.decoders)

    def lower(
        self, task: str, given: Sequence[Mapping[str, Any]], scale: float | None = None, guided: bool = False
    ) -> jax.stages.Lowered:
        """The program of one full call, traced with shapes only; parameters may be abstract, with shardings.

        guided   with guidance even if these examples have no conditions
        """
        request, mesh = self._request(task, given, scale, None, guided), mesh_of(self.params)
        rows = abstract(chunk((request.batch, request.null), 0, self.batch_size, mesh), mesh)
        key = jax.ShapeDtypeStruct((), np.uint32), jax.ShapeDtypeStruct((), np.int32)
        with contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh):
            return _fill.lower(request.program, request.program.plan.made[0], self.params, *rows, *key)

    # ------------------------------------------------------------------ rows

    def _request(
        self,
        task: str,
        given: Sequence[Mapping[str, Any]],
        scale: float | None,
        decoders: Mapping[str, Decoder] | None,
        guided: bool = False,
    ) -> _Request:
        guidance = self.guidance if scale is None else dataclasses.replace(self.guidance, scale=scale)
        decoders = dict(self.decoders) | dict(decoders or {})
        kept, plan, layout, batch = self._planned(task, given, decoders)
        null = None
        if guidance.scale != 1 and (guided or self.tasks[task].conditional):
            wider, null = self._prompts(task, given, null=True)
            _, null = self._fitted(wider.only(lambda segment: segment in kept), null, plan, decoders)
        plan = plan_of(layout, batch)
        layout = layout.with_leads(lambda segment: self.leads.get((task, segment.name), 0))
        mesh = mesh_of(self.params)
        delivered, batch = batch, self._encoded(batch, plan, mesh)
        null = None if null is None else self._encoded(null, plan, mesh, (delivered, batch))
        if null is not None and not guided and all(map(_same, jax.tree.leaves(batch), jax.tree.leaves(null))):
            null = None  # no conditions, so guidance would change nothing
        used = {row_of(segment.name) for segment in layout.segments}
        chosen = tuple((row, decoder) for row, decoder in sorted(decoders.items()) if row in used)
        specs = tuple(sorted(specs_of(self.params).items()))
        return _Request(_Program(self.bind, self.dtype, layout, plan, chosen, guidance, specs), batch, null)

    def _planned(
        self, task: str, given: Sequence[Mapping[str, Any]], decoders: Mapping[str, Decoder]
    ) -> tuple[Any, SamplingPlan, Layout, Batch]:
        """The segments up to the last generated one, the plan, and layout and rows as fitted by the decoders."""
        if task not in self.tasks:
            raise ValueError(f"there is no task {task!r}; this system has {', '.join(self.tasks)}")
        _check_examples(task, given)
        layout, batch = self._prompts(task, given, null=False)
        plan = plan_of(layout, batch)
        if not plan.made:
            raise ValueError(f"task {task} generates {', '.join(self.tasks[task].fill)}, but the examples have it all")
        last = max(i for i, s in enumerate(layout.segments) if set(s.names) & set(plan.made))
        kept = layout.segments[: last + 1]
        layout, batch = self._fitted(layout.only(lambda segment: segment in kept), batch, plan, decoders)
        return kept, plan, layout, batch

    def _prompts(self, task: str, given: Sequence[Mapping[str, Any]], null: bool) -> tuple[Layout, Batch]:
        """The task's rows of the examples, built in chunks to limit memory."""
        parts = []
        for start in range(0, len(given), self.batch_size):
            layout, batch = self.tasks[task].prompt(given[start : start + self.batch_size], null)
            parts.append(jax.tree.map(np.asarray, batch))
        return layout, jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def _fitted(
        self, layout: Layout, batch: Batch, plan: SamplingPlan, decoders: Mapping[str, Decoder]
    ) -> tuple[Layout, Batch]:
        """Layout and rows with the decoders' blocks and lengths."""
        segments, tokens = [], {name: batch.tokens[name] for s in layout.segments for name in s.names}
        for segment in layout.segments:
            made = [name for name in segment.names if name in plan.made]
            row = row_of(segment.name)
            if made and row not in decoders:
                raise ValueError(f"config.decode has no decoder for {row}: add one, left_to_right or blocks")
            if made:
                begins = {n: (tokens[n].valid & ~tokens[n].target).sum(axis=1) for n in made}
                begin = max(int(b.max()) for b in begins.values())
                fitted = decoders[row].fit(segment, begin, free=not self.fields[row].spec.grid)
                if fitted.length != segment.length:
                    new = {n: resized(tokens[n], fitted.length, fitted.length - begin) for n in segment.names}
                    tokens |= new
                segment = fitted
            segments.append(segment)
        return type(layout)(tuple(segments)), batch.replace(tokens=tokens)

    def _encoded(self, batch: Batch, plan: SamplingPlan, mesh: Any, known: tuple[Batch, Batch] | None = None) -> Batch:
        """The batch after the frozen links, without values of names that are generated as a whole.

        known   another batch before and after this: equal values are not encoded again
        """
        tokens = {}
        for name, old in batch.tokens.items():
            if name in plan.made and name not in plan.mixed:
                tokens[name] = old.replace(value=np.zeros((len(old.valid), 0), np.float32))
            elif known is not None and _same(known[0].tokens[name].value, old.value):
                tokens[name] = old.replace(value=known[1].tokens[name].value)
            else:
                tokens[name] = old.replace(value=self.frozen.encode(row_of(name), old.value, mesh))
        return batch.replace(tokens=tokens)


def _check_examples(task: str, given: Any) -> None:
    """Raises ValueError unless `given` is a sequence of mappings with at least one: a text would be read by letter."""
    wanted = f"task {task} completes a list of examples, such as [{{'caption': 'seven'}}]"
    if isinstance(given, str | bytes | Mapping) or not isinstance(given, Iterable) or not hasattr(given, "__len__"):
        raise ValueError(f"{wanted}, not {shown(given)}: put it into a list")
    if not len(given):
        raise ValueError(f"task {task} got no examples to complete")
    for number, example in enumerate(given):
        if not isinstance(example, Mapping):
            raise ValueError(f"{wanted}, but number {number} is {shown(example)}: name its value")


def build_pipeline(config: Any, architecture: Any, plans: Mapping[str, Any], encoders: Any) -> Pipeline:
    """The pipeline of a config.

    architecture   `models.model.Architecture`
    plans          by task: the data task, and the layout of its training rows for the leads
    encoders       `nets`: the frozen links by field

    Raises ValueError, naming `decode.<field>` or `guidance`, for unknown or unsuitable options.
    """
    decoders = {row: build("sampling/decoders", group, where=f"decode.{row}") for row, group in config.decode.items()}
    decoders = {row: decoder for row, decoder in decoders.items() if row in architecture.table}
    interval = tuple(config.guidance.interval)
    if len(interval) != 2 or not all(isinstance(time, int | float) for time in interval):
        raise ValueError(f"guidance.interval={interval}; give two times, as (0.0, 1.0)")
    options = {**config.guidance, "interval": interval}
    check_arguments(Guidance, options, where="guidance")
    guidance = Guidance(**options)
    check_times(architecture.table, {name: plan.layout for name, plan in plans.items()})
    leads = {(task, s.name): s.lead for task, plan in plans.items() for s in plan.layout.segments}
    tasks = {name: plan.task for name, plan in plans.items()}
    frozen = FrozenLinks(encoders.nets)
    size, dtype = config.sample.batch_size, jnp.dtype(config.model.dtype)
    return Pipeline(architecture.bind, architecture.table, tasks, leads, decoders, guidance, size, dtype, frozen)


def check_times(fields: Mapping[str, Field], layouts: Mapping[str, Layout]) -> None:
    """Raises ValueError for fields on the same tokens whose steps have other times: all share one."""
    for task, layout in layouts.items():
        for segment in layout.segments:
            rows = [fields[row_of(name)] for name in segment.names]
            rows = [field for field in rows if field.process is not None and field.step is not None]
            if len(rows) < 2:
                continue
            grids = [np.asarray(field.step.times(field.process, 8)) for field in rows]
            for field, grid in zip(rows[1:], grids[1:], strict=True):
                if not np.allclose(grid, grids[0], atol=0.01):  # the first time may be 1 or a little less
                    raise ValueError(
                        f"tasks.{task}: {rows[0].name} and {field.name} lie on the same tokens, but the times of"
                        f" fields.{rows[0].name}.step and fields.{field.name}.step differ: give both the same shift and"
                        " spacing"
                    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _fill(
    program: _Program, name: str, params: PyTree, batch: Batch, null: Batch | None, seed: Array, start: Array
) -> tuple[dict[str, Array], Array]:
    """Generated tokens by name, and the passes that each row needed. The key depends on seed, first generated name
    (`name`) and first row (`start`)."""
    placement = Placement(dict(program.specs), program.dtype) if program.specs else None
    net = program.bind(params, placement)
    view = _view(net, batch, program)
    free = None if null is None else _view(net, null, program)
    walk = Walk.begin(net, view, program.plan, free, program.guidance)
    return fill(walk, stream(jax.random.key(seed), name, start), dict(program.decoders)), walk.calls


def _view(net: Net, batch: Batch, program: _Program) -> View:
    """Rows after the device links of their codecs; names generated as a whole are zeros."""
    tokens = {}
    for name, old in batch.tokens.items():
        field = net.field(name).field
        if name in program.plan.made and name not in program.plan.mixed:
            shape = old.valid.shape if field.spec.features is None else (*old.valid.shape, field.spec.features)
            tokens[name] = old.replace(value=jnp.zeros(shape, jnp.float32 if field.spec.vocab is None else jnp.int32))
        else:
            tokens[name] = encoded(field.codec, old)
    return View(jax.tree.map(jnp.asarray, batch.replace(tokens=tokens)), program.layout)


def _raw(host: Any, value: Any) -> Any:
    return host.decode(value)


def _same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and bool(np.array_equal(a, b))
