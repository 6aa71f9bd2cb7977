"""The model: embedders, one transformer and heads. It is the `Net` of the interfaces, the only door to parameters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from src.common.mesh.constraints import automatic_axes, constrain
from src.common.mesh.fsdp import Placement
from src.common.tree import joined
from src.interfaces import Hidden, Net, Prediction, PyTree, SequenceSpec, View
from src.models.conditioning import Condition, Conditioning, TimestepEmbedder
from src.models.embedders import LabelEmbedder, PatchEmbedder, TokenEmbedder, VisionEmbedder
from src.models.heads.linear import ImageHead, TextHead
from src.models.packed import embed_document
from src.models.transformer import Cache, Tap, Transformer
from src.sequence.layout import Layout, positions, time_name
from src.sequence.packed import Document

STACKED = "trunk/layers/"  # where parameters have a first axis of layers
TEACHER = "teacher"  # beside the parts of a model, parameters that the run began with


class Embedded(NamedTuple):
    """A row-batch ready for the trunk."""

    x: Float[Array, "B S D"]
    spec: SequenceSpec
    condition: Condition


class Model(nnx.Module):
    """Text ids, image patches and features in, hidden states out; heads on request.

    A part is absent when the system does not need it: `text` without a vocabulary, `image` without patches, `vision`
    without an encoder, `labels` without classes.
    """

    def __init__(
        self,
        trunk: Transformer,
        conditioning: Conditioning,
        *,
        time: TimestepEmbedder | None = None,
        text: TokenEmbedder | None = None,
        text_head: TextHead | None = None,
        image: PatchEmbedder | None = None,
        image_head: ImageHead | None = None,
        vision: VisionEmbedder | None = None,
        labels: LabelEmbedder | None = None,
    ):
        self.trunk, self.conditioning, self.time, self.labels = trunk, conditioning, time, labels
        self.text, self.text_head, self.image, self.image_head = text, text_head, image, image_head
        self.vision = vision
        self.open_teacher: Callable[[], Model] | None = None

    # ------------------------------------------------------------------ training: whole rows

    def hidden(self, views: Mapping[str, tuple[Layout, View]]) -> dict[str, Hidden]:
        """Hidden states of every task; tasks of one row length go through the trunk together."""
        embedded = {task: self._embed(layout, view) for task, (layout, view) in views.items()}
        groups = defaultdict(list)
        for task, e in embedded.items():
            groups[e[0].x.shape[1], e[0].condition.vector.shape[1]].append(task)
        out = {}
        for tasks in groups.values():
            joined = _join([embedded[task][0] for task in tasks])
            length = joined.x.shape[1]
            joined = _pad(joined, -length % automatic_axes().get("context", 1))
            joined = joined._replace(x=constrain(joined.x, "rows", "places", None))
            sequence, _ = self.trunk(joined.x, joined.spec, joined.condition)
            sequence = constrain(sequence, "rows", None, None)[:, :length]
            ends = np.cumsum([embedded[task][0].x.shape[0] for task in tasks])[:-1]
            for task, rows in zip(tasks, jnp.split(sequence, ends), strict=True):
                e, vectors = embedded[task]
                out[task] = Hidden(rows, e.spec.segment > 0, vectors, views[task][0], views[task][1].places)
        return out

    def text_logits(self, hidden: Float[Array, "B N D"]) -> Float[Array, "B N V"]:
        """Logits of the next token, f32."""
        return self.text_head(hidden)

    def text_nats(self, hidden: Float[Array, "B N D"], ids: Int[Array, "B N"]) -> Float[Array, "B N"]:
        """-log p(ids | hidden), f32; large vocabularies go in pieces (`models/heads/chunked_cross_entropy.py`)."""
        return self.text_head.nats(hidden, ids)

    def text_divergence(
        self, hidden: Float[Array, "B N D"], teacher: Net, taught: Float[Array, "B N D"], temperature: float
    ) -> Float[Array, "B N"]:
        """temperature² · KL(teacher's next token given `taught` || ours given `hidden`), f32, in pieces."""
        return self.text_head.divergence(hidden, teacher.text_head, taught, temperature)

    def teacher(self) -> Model:
        """The model with the parameters that the run began with. Raises ValueError when nobody kept them."""
        if self.open_teacher is None:
            raise ValueError("these parameters bring no teacher: bind what `train.state.shown` makes of a state")
        return self.open_teacher()

    def image_prediction(self, hidden: Float[Array, "B N D"], vector: Float[Array, "B T D"]) -> Prediction:
        """The denoiser's output for the patches of one image segment, f32."""
        return self.image_head(hidden, vector)

    # ------------------------------------------------------------------ sampling: segment by segment

    def start_cache(self, layout: Layout, rows: int) -> Cache:
        """An empty cache for rows of this layout."""
        read, write, group = layout.static_orders()
        segment = jnp.zeros((rows, layout.length), jnp.int32)
        return self.trunk.empty_cache(SequenceSpec(read, write, group, segment, segment[..., None]), rows)

    def extend(self, layout: Layout, part: Layout, start: int, view: View, cache: Cache) -> tuple[Hidden, Cache]:
        """Runs some neighbouring segments of `layout` over the cache and writes them to it at slot `start`.

        `part` names them; it may hold only the beginning of a segment. A time token goes with its image.
        """
        e, vectors = self._embed(part, view)
        spec = _place(layout, e.spec.segment > 0, start, cache)
        sequence, cache = self.trunk(e.x, spec, e.condition, cache, start)
        return Hidden(sequence, e.spec.segment > 0, vectors, part), cache

    def extend_token(
        self, layout: Layout, ids: Int[Array, "B"], valid: Bool[Array, "B"], slot: Int[Array, ""], cache: Cache
    ) -> tuple[Float[Array, "B D"], Cache]:
        """Runs one text token per row over the cache, at a slot that may be traced."""
        x = self.text(ids[:, None])
        none = Condition(jnp.zeros_like(x), np.full(1, -1, np.int32))
        sequence, cache = self.trunk(x, _place(layout, valid[:, None], slot, cache), none, cache, slot)
        return sequence[:, 0], cache

    # ------------------------------------------------------------------ parts

    def embedded(self, layout: Layout, view: View) -> Float[Array, "B S D"]:
        """What the trunk would get of these rows."""
        return self._embed(layout, view)[0].x

    def _embed(self, layout: Layout, view: View) -> tuple[Embedded, dict[str, Array]]:
        """Vectors, visibility and condition of whole segments, and the condition of each image by name."""
        if isinstance(layout, Document):
            *embedded, vectors = embed_document(self, layout, view)
            return Embedded(*embedded), vectors
        rows = next(iter(view.inputs.values())).shape[0]
        vectors = {name: self._vector(name, rows, view) for name in layout.named("image")}
        parts = [self._segment(s, view, vectors, rows) for s in layout.segments]
        condition = _condition(layout, vectors, jnp.zeros_like(parts[0][:, :1]))
        spec = layout.spec(layout.valid(view.valid, rows))
        return Embedded(jnp.concatenate(parts, axis=1), spec, condition), vectors

    def _vector(self, name: str, rows: int, view: View) -> Float[Array, "B T D"]:
        """Time embedding of an image segment (clean when no time is given) plus the label's embedding."""
        vector = self.time(view.times.get(name, jnp.zeros((rows, 1), jnp.float32)))
        return vector if view.labels is None else vector + self.labels(view.labels)[:, None]

    def _segment(self, segment, view: View, vectors: dict[str, Array], rows: int) -> Float[Array, "B N D"]:
        if segment.kind == "text":
            return self.text(view.inputs[segment.name])
        if segment.kind == "image":
            x = self.image(view.inputs[segment.name], (view.grids or {}).get(segment.name))
            return self.conditioning.before(x, vectors[segment.name])
        if segment.kind == "vision":
            return self.vision(view.inputs[segment.name])
        image = next(name for name in view.inputs if time_name(name) == segment.name)
        vector = vectors[image] if image in vectors else self._vector(image, rows, view)
        return self.conditioning.token(vector[:, :1])


def _condition(layout: Layout, vectors: dict[str, Array], none: Array) -> Condition:
    """All conditioning vectors of a row, and which of them each token belongs to."""
    owner = np.full(layout.length, -1, np.int32)
    first = 0
    for name, where in layout.slices().items():
        if name in vectors:
            times, length = vectors[name].shape[1], where.stop - where.start
            owner[where] = first + np.arange(length) * times // length
            first += times
    image = np.concatenate([np.full(s.length, s.kind != "text") for s in layout.segments])
    return Condition(jnp.concatenate(list(vectors.values()), axis=1) if vectors else none, owner, image)


def _join(parts: list[Embedded]) -> Embedded:
    """Stacks the rows of several tasks; a single task keeps its static arrays."""
    if len(parts) == 1:
        return parts[0]

    def widen(e: Embedded) -> Embedded:
        shape = e.x.shape[:2]
        static = {k: jnp.broadcast_to(getattr(e.spec, k), shape) for k in ("read", "write", "group")}
        owner, image = jnp.broadcast_to(e.condition.owner, shape), np.broadcast_to(e.condition.image, shape)
        return e._replace(spec=e.spec.replace(**static), condition=e.condition._replace(owner=owner, image=image))

    def stack(*leaves):  # what is known before any data stays so
        return (np if isinstance(leaves[0], np.ndarray) else jnp).concatenate(leaves)

    return jax.tree.map(stack, *(widen(e) for e in parts))


def _pad(e: Embedded, places: int) -> Embedded:
    """Rows with some places of padding behind them, so that the mesh axis `context` divides their length."""
    if not places:
        return e

    def widen(a, axis: int, value: int = 0):
        amount = [(0, places if i == axis else 0) for i in range(a.ndim)]
        return (np if isinstance(a, np.ndarray) else jnp).pad(a, amount, constant_values=value)

    spec = e.spec
    last = {k: widen(a, a.ndim - 1) for k in ("read", "write", "group", "segment") for a in [getattr(spec, k)]}
    relation = None if spec.relation is None else widen(widen(spec.relation, 1), 2)
    spec = SequenceSpec(**last, position=widen(spec.position, 1), relation=relation)
    owner, image = e.condition.owner, e.condition.image
    owner, image = widen(owner, owner.ndim - 1, -1), widen(image, image.ndim - 1)
    return Embedded(widen(e.x, 1), spec, e.condition._replace(owner=owner, image=image))


def _place(layout: Layout, valid: Bool[Array, "B N"], start, cache: Cache) -> SequenceSpec:
    """SequenceSpec of new tokens at `start`: their slots' orders; positions go on from the row's valid tokens."""
    orders = [jax.lax.dynamic_slice_in_dim(jnp.asarray(o), start, valid.shape[1]) for o in layout.static_orders()]
    count = (cache.spec.segment > 0).sum(axis=1)[:, None, None]
    return SequenceSpec(*orders, valid.astype(jnp.int32), positions(valid) + count)


def bind(graph: nnx.GraphDef, params: PyTree, placement: Placement | None = None, tap: Tap | None = None) -> Model:
    """The model with these parameters, a nested dict of arrays.

    With a placement, parameters are fetched from where they lie: those of the blocks layer by layer, when the trunk
    gets to them, the others here. With a tap, each pass of the trunk leaves what the tap says of every block's output.
    What lies below `TEACHER` takes the place of the parameters of its paths in `teacher()`, which has no gradient.
    """
    own = {name: part for name, part in params.items() if name != TEACHER}
    if placement is None:
        model = nnx.merge(graph, nnx.State(own))
    else:
        rest = own | {"trunk": {k: v for k, v in own["trunk"].items() if k != "layers"}}
        rest = placement.fetch(rest)
        model = nnx.merge(graph, nnx.State(rest | {"trunk": rest["trunk"] | {"layers": own["trunk"]["layers"]}}))
        model.trunk.fetch = lambda layer: placement.fetch(layer, STACKED, stacked=True)
    model.trunk.tap = tap
    if TEACHER in params:
        model.open_teacher = lambda: bind(graph, jax.lax.stop_gradient(joined(own, params[TEACHER])), placement)
    return model
