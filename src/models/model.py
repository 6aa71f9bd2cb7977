"""The model: the parts of every field, one transformer, and the access to them. No code here depends on what a field
holds."""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from src.common.mesh.constraints import automatic_axes, constrain
from src.common.mesh.fsdp import Placement
from src.common.tree import joined
from src.interfaces import Field, Guide, Hidden, PyTree, SequenceSpec, View, row_of
from src.models.conditioning import Condition, Conditioning, TimestepEmbedder
from src.models.embed import Embedded, conditions, join_rows, pad_rows
from src.models.transformer import Cache, Runtime, Transformer
from src.sequence.segment import Segment

STACKED = "trunk/layers/"  # where parameters have a first axis of layers
TEACHER = "teacher"  # beside the parts of a model: parameters that the run began with
STATES = "states"  # and: the states of adaptive processes, by field
Part = nnx.Module | None


class FieldParts(nnx.Module):
    """The parameters of one row of the table; a part that the row does not have is None.

    embed   value -> vectors [B, N, D]; of a condition [B, D]
    head    hidden states -> outputs
    codec   learned: clean tokens <-> what the process corrupts
    hint    self-conditioning -> what is added to the embedding; linear without bias, so that none is a hint of zeros
    """

    def __init__(self, embed: Part = None, head: Part = None, codec: Part = None, hint: Part = None):
        self.embed, self.head, self.codec, self.hint = embed, head, codec, hint


class Model(nnx.Module):
    """All parameters: the trunk, how it is conditioned, the embedding of times, and the parts of each field."""

    def __init__(
        self,
        trunk: Transformer,
        conditioning: Conditioning,
        fields: Mapping[str, FieldParts],
        time: TimestepEmbedder | None = None,
    ):
        self.trunk, self.conditioning, self.time = trunk, conditioning, time
        self.fields = nnx.Dict(dict(fields))


@dataclasses.dataclass(frozen=True)
class ModelField:
    """A row of the table with its parameters and the state of its process. See `interfaces.BoundField`."""

    field: Field
    parts: FieldParts
    process: Any

    def __call__(self, hidden: Array, cond: Array | None = None) -> Array:
        return self._scoped(self.parts.head, hidden, cond)

    def noise(self, key: Array, shape: tuple[int, int]) -> PyTree:
        """All that `nll` draws."""
        return self.parts.head.noise(key, shape)

    def nll(self, hidden: Array, target: Array, noise: PyTree = ()) -> Array:
        """-log p(target | hidden), or what stands for it."""
        return self._scoped(self.parts.head.nll, hidden, target, noise)

    past = property(lambda self: getattr(self.parts.head, "past", 0))  # tokens before the next one that the head reads

    def sample(self, key: Array, hidden: Array, guide: Guide, choose: Callable[..., Array], *past: Array) -> Array:
        """The next token of each row; `past`: the tokens before it, of a head that reads some."""
        return self._scoped(self.parts.head.sample, key, hidden, guide, choose, *past)

    def divergence(self, hidden: Array, other: ModelField, states: Array, temperature: float = 1.0) -> Array:
        """KL(other || this row) of the next token, of two networks' hidden states."""
        return self._scoped(self.parts.head.divergence, hidden, other.parts.head, states, temperature)

    def encode(self, value: Array) -> PyTree:
        """Clean tokens as the process corrupts them."""
        return value if self.parts.codec is None else self.parts.codec.encode(value)

    def decode(self, x0: PyTree) -> Array:
        """Clean tokens again."""
        return x0 if self.parts.codec is None else self.parts.codec.decode(x0)

    def codec_losses(self, value: Array) -> dict[str, Array]:
        """What the learned codec is trained on."""
        return self.parts.codec.losses(value)

    def _scoped(self, call: Callable[..., Array], *arguments: Any) -> Array:
        with jax.named_scope(f"head_{self.field.name}"):  # of the head's operations in a trace
            return call(*arguments)


@dataclasses.dataclass(frozen=True, eq=False)
class Architecture:
    """A model without parameters, and the table of its fields.

    graph   of `Model`
    own     fields whose tokens have parts of the trunk of their own, where it has some
    """

    graph: nnx.GraphDef
    table: Mapping[str, Field]
    own: tuple[str, ...] = ()

    def bind(self, params: PyTree, placement: Placement | None = None) -> Network:
        """The network with these parameters, see `bind`."""
        return bind(self, params, placement)


@dataclasses.dataclass(frozen=True)
class Network:
    """An architecture with parameters: the `Net` of the interfaces, the only door to parameters."""

    architecture: Architecture
    model: Model
    runtime: Runtime = dataclasses.field(default_factory=Runtime)
    states: Mapping[str, PyTree] = dataclasses.field(default_factory=dict)
    open_teacher: Callable[[], Network] | None = None

    def field(self, name: str) -> ModelField:
        """The row of the table that a name belongs to."""
        row = row_of(name)
        field = self.architecture.table[row]
        process = field.process.bind(self.states[row]) if row in self.states else field.process
        return ModelField(field, self.model.fields[row], process)

    def teacher(self) -> Network:
        """The network with the parameters that the run began with. Raises ValueError when they were not kept."""
        if self.open_teacher is None:
            raise ValueError("no teacher parameters were kept: bind what `train.state.with_extras` makes of a state")
        return self.open_teacher()

    # ------------------------------------------------------------------ training: whole rows

    def hidden(self, views: Mapping[str, View]) -> dict[str, Hidden]:
        """Hidden states of every task; tasks of one row length go through the trunk together."""
        return self.run(views)[0]

    def run(self, views: Mapping[str, View]) -> tuple[dict[str, Hidden], list[PyTree]]:
        """`hidden`, and what the runtime measures of each pass of the trunk."""
        with jax.named_scope("embed"):
            embedded = {task: self.embedded(view) for task, view in views.items()}
        groups = defaultdict(list)
        for task, e in embedded.items():
            groups[e.x.shape[1], e.condition.vector.shape[1]].append(task)
        out, measured = {}, []
        for tasks in groups.values():
            whole = join_rows([embedded[task] for task in tasks])
            length = whole.x.shape[1]
            whole = pad_rows(whole, -length % automatic_axes().get("context", 1))
            x = constrain(whole.x, "rows", "places", None)
            with jax.named_scope("trunk"):
                sequence, _, seen = self.model.trunk(x, whole.spec, whole.condition, runtime=self.runtime)
            measured.append(seen)
            sequence = constrain(sequence, "rows", None, None)[:, :length]
            start = 0
            for task in tasks:
                e = embedded[task]
                rows = e.x.shape[0]
                out[task] = Hidden(views[task], sequence[start : start + rows], e.vectors)
                start += rows
        return out, measured

    def embedded(self, view: View) -> Embedded:
        """The rows of a task as the trunk gets them."""
        layout, batch = view.layout, view.batch
        parts, vectors, heads = {}, {}, {}
        for segment in layout.segments:
            for copy in COPIES[segment.role]:
                vector = self._vector(view, segment, copy)
                for name in segment.names:
                    parts[name, copy] = self._tokens(view, name, copy, vector)
                    if vector is not None:
                        heads[name] = vector
                if vector is not None:
                    vectors[segment.name, copy] = vector
            if segment.lead:
                parts[segment.name, "lead"] = self._lead(view, segment)
        x = layout.join(batch, parts)
        return Embedded(x, layout.spec(batch), conditions(layout, batch, x, vectors, self._own()), heads)

    # ------------------------------------------------------------------ sampling: part by part

    def start_cache(self, view: View) -> Cache:
        """An empty cache for rows like these."""
        spec = view.layout.spec(view.batch)
        return self.model.trunk.empty_cache(spec, spec.segment.shape[0])

    def extend(
        self, view: View, segment: Segment, copy: str, start: Any, size: int, spec: SequenceSpec, cache: Cache
    ) -> tuple[Float[Array, "B N D"], Cache]:
        """See `interfaces.Net`."""
        whole = isinstance(start, int) and start == 0 and size == segment.length
        vector = self._vector(view, segment, copy)
        if vector is not None and vector.shape[1] > 1:
            vector = jax.lax.dynamic_slice_in_dim(vector, start, size, axis=1)
        piece = None if whole else (start, size)
        x = sum(self._tokens(view, name, copy, vector, piece) for name in segment.names)
        lead = segment.lead if isinstance(start, int) and start == 0 else 0
        if lead:
            x = jnp.concatenate([self._lead(view, segment), x], axis=1)
        slot = view.layout.part(segment.name, copy).start + start - lead
        length = lead + size

        def cut(a: Array | np.ndarray) -> Array:
            return jax.lax.dynamic_slice_in_dim(jnp.asarray(a), slot, length, axis=1 if a.ndim > 1 else 0)

        new = SequenceSpec(cut(spec.read), cut(spec.write), cut(spec.group), cut(spec.segment), cut(spec.position))
        owner = jnp.full(length, -1) if vector is None else jnp.arange(length) - lead
        if vector is None:
            vector = jnp.zeros_like(x[:, :1])
        elif vector.shape[1] == 1:
            owner = jnp.where(jnp.arange(length) < lead, -1, 0)
        own = np.full(length, row_of(segment.name) in self._own())
        sequence, cache, _ = self.model.trunk(x, new, Condition(vector, owner, own), cache, slot, self.runtime)
        return sequence[:, lead:], cache

    def vector(self, view: View, segment: Segment, copy: str) -> Float[Array, "B T D"] | None:
        """See `interfaces.Net`."""
        return self._vector(view, segment, copy)

    # ------------------------------------------------------------------ parts

    def _own(self) -> tuple[str, ...]:
        return self.architecture.own if self.model.trunk.mot else ()

    def _lead(self, view: View, segment: Segment) -> Array:
        """The tokens in front of a segment [B, lead, D], or of each of its parts [B, M, lead, D]."""
        times = self._times(view, segment, COPIES[segment.role][0])
        one = _is_one(view, segment.name)
        if times is None:  # only read: at time 0
            value = view.batch.tokens[segment.name].value
            times = jnp.zeros((value.shape[0], view.layout.parts_of(segment.name)), jnp.float32)
        elif one:  # given tokens have time 0; it is in front of the first block
            times = times[:, : segment.sizes(noisy=True)[0]].max(axis=1, keepdims=True)
        token = self.model.conditioning.token(self._condition(view, times))
        return token if one else token[:, :, None]

    def _times(self, view: View, segment: Segment, copy: str) -> Float[Array, "B T"] | None:
        """The times of a segment's copy, of several names on a token the latest. None where no field tells its time."""
        found = []
        for name in segment.names:
            field = self.architecture.table[row_of(name)]
            if field.process is None or not field.timed:
                continue
            value = view.batch.tokens[name].value
            clean = jnp.zeros((value.shape[0], view.layout.parts_of(name)), jnp.float32)
            found.append(view.times.get(name, clean) if copy == "noisy" else clean)
        return functools.reduce(jnp.maximum, found) if found else None

    def _condition(self, view: View, times: Float[Array, "B T"] | None) -> Float[Array, "B T D"] | None:
        """The embedding of times, and of the row's conditions. None where there is neither."""
        found = [] if times is None else [self.model.time(times)]
        for name, value in view.batch.cond.items():
            found.append(self.model.fields[name].embed(value)[:, None])
        return sum(found[1:], found[0]) if found else None

    def _vector(self, view: View, segment: Segment, copy: str) -> Float[Array, "B T D"] | None:
        """What conditions the tokens of a segment's copy: their time, clean when none is given, and the row's
        conditions. None where the fields have no process."""
        if all(self.architecture.table[row_of(name)].process is None for name in segment.names):
            return None
        return self._condition(view, self._times(view, segment, copy))

    def _tokens(
        self, view: View, name: str, copy: str, vector: Array | None, piece: tuple[Any, int] | None = None
    ) -> Array:
        """The vectors of a name's tokens [B, N, D], or of its parts [B, M, N, D]; `piece`: of some of them, by first
        token and number."""
        bound, tokens = self.field(name), view.batch.tokens[name]
        parts = bound.parts
        if copy == "noisy" and name in view.noisy:
            value = view.noisy[name]
        else:
            value = bound.encode(tokens.value)
            if bound.process is not None:
                value = bound.process.network(value, jnp.zeros((1, 1), jnp.float32))[0]
        place, hint = tokens.place, view.hints.get(name)
        if piece is not None:
            cut = lambda a: None if a is None else jax.lax.dynamic_slice_in_dim(a, *piece, axis=1)
            place = cut(place) if tokens.place is not None else places(bound.field.spec.grid, *piece, value.shape[0])
            value, hint = cut(value), cut(hint)
        outer = value.shape[:2]
        one = _is_one(view, name)
        fold = lambda a: a if one or a is None else a.reshape(-1, *a.shape[2:])
        x = parts.embed(fold(value), fold(place))
        if hint is not None:
            x = x + parts.hint(fold(hint))
        if vector is not None and (copy == "noisy" or self.model.conditioning.clean):
            x = self.model.conditioning.before(x, vector if one else vector.reshape(-1, 1, vector.shape[-1]))
        return x if one else x.reshape(*outer, *x.shape[1:])


COPIES = {"clean": ("clean",), "noisy": ("noisy",), "copies": ("clean", "noisy")}  # of a segment, by its role


def _is_one(view: View, name: str) -> bool:
    """Whether values of a name are [B, N, …], not parts of packed rows."""
    return view.batch.packing is None or name not in view.batch.packing.begins


def places(grid: tuple[int, ...], start: Any, size: int, rows: int) -> Int[Array, "B N axes"] | None:
    """Coordinates in a grid, by rows, of some neighbouring tokens; None where there is no grid."""
    if not grid:
        return None
    index, found = start + jnp.arange(size), []
    for side in reversed(grid):
        found.append(index % side)
        index = index // side
    return jnp.broadcast_to(jnp.stack(found[::-1], axis=-1), (rows, size, len(grid)))


def bind(
    architecture: Architecture,
    params: PyTree,
    placement: Placement | None = None,
    measure: Callable[[Array], PyTree] | None = None,
) -> Network:
    """The network with these parameters, a nested dict of arrays.

    With a placement, parameters are fetched from where they lie: those of the blocks layer by layer, when the trunk
    gets to them, the others here. `measure` is `Runtime.measure`. What lies below `TEACHER` takes the place of the
    parameters of its paths in `teacher()`, which has no gradient; below `STATES` are the states of processes.
    """
    own = {name: part for name, part in params.items() if name not in (TEACHER, STATES)}
    runtime, whole = Runtime(measure=measure), own
    if placement is not None:
        rest = own | {"trunk": {k: v for k, v in own["trunk"].items() if k != "layers"}}
        rest = placement.fetch(rest)
        whole = rest | {"trunk": rest["trunk"] | {"layers": own["trunk"]["layers"]}}
        runtime = Runtime(lambda layer: placement.fetch(layer, STACKED, stacked=True), measure)
    model = nnx.merge(architecture.graph, nnx.State(whole))
    teacher = None
    if TEACHER in params:
        teacher = lambda: bind(architecture, jax.lax.stop_gradient(joined(own, params[TEACHER])), placement)
    return Network(architecture, model, runtime, params.get(STATES, {}), teacher)
