"""The contracts between the floors, and the glossary of letters.

Shapes:  B batch · S sequence · N tokens of one field · D width · H heads · K kv heads · V vocabulary
         C channels · P patch features · F features of a frozen encoder · A rotary axes · L layers
         T times of one row (1, or N when every token has its own)

Time:    t in [0, 1] everywhere; t = 0 is clean data, t = 1 is noise. A discrete process with n steps puts its
         index k (0 … n-1) at t = (k + 1) / n.

Words:   field     a named array of an example (prompt, image, caption, label)
         segment   a span of the sequence that holds a field
         kind      how the model embeds and reads a segment: text | image | vision | time
                   (image: drawn by diffusion; vision: understood, given as features of a frozen encoder)
         layout    the order of the segments and how their tokens see each other
         mode      how the tokens of one segment see each other: causal | bidirectional | block:<size>
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

PyTree = Any
PARAMETERIZATIONS = ("eps", "x0", "v", "velocity", "score")


# --------------------------------------------------------------------------- fields of a batch


@struct.dataclass
class TokenField:
    """Text of one segment. `valid` is False on padding; `loss` marks the targets of a text objective."""

    ids: Int[Array, "*B N"]
    valid: Bool[Array, "*B N"]
    loss: Bool[Array, "*B N"]


@struct.dataclass
class ImageField:
    """A continuous field: pixels or latents, channels last; the step gets features [B, N, F] in a vision segment.

    `valid` is False for rows that no objective may count, whatever their values, and that a vision segment leaves
    empty; None: all rows count. A packed row has several images: `*B` is then B, M.
    """

    values: Float[Array, "*B height width C"] | Float[Array, "*B N F"]
    valid: Bool[Array, "*B"] | None = None


@struct.dataclass
class BucketField(ImageField):
    """Images in buckets of aspect ratios. Their patches lie in their order in `values`, of one shape for all
    (`codecs/buckets.py`); `grid` is rows and columns of each image's patches."""

    grid: Int[Array, "*B 2"] | None = None


@struct.dataclass
class LabelField:
    """A class index that conditions the whole row instead of taking a place in the sequence."""

    ids: Int[Array, "*B"]


@struct.dataclass
class PlaceField:
    """Where things lie in packed rows (`sequence.document.Document`).

    segment  number of the packed example that each slot belongs to, from 1; 0: padding. An example's slots are
             neighbours
    begins   by image field: the first slot of each image, -1 where there is none
    """

    segment: Int[Array, "*B S"]
    begins: dict[str, Int[Array, "*B M"]]


Field = TokenField | ImageField | LabelField | PlaceField
Batch = Mapping[str, Field]


# --------------------------------------------------------------------------- sequence


@struct.dataclass
class SequenceSpec:
    """Who sees whom. Arrays are `[S]` when every row is alike, `[B, S]` when they vary by row.

    visible(q, k) = segment_q == segment_k > 0  AND  (write_k <= read_q  OR  group_q == group_k > 0)  [AND relation_qk]

    read      highest order that a query may read
    write     order at which a key becomes readable
    group     > 0: members see each other whatever the order
    segment   id of the packed example, 0 = padding
    position  rotary position per axis
    relation  optional extra restriction (graphs, floor plans)
    """

    read: Int[Array, "*B S"]
    write: Int[Array, "*B S"]
    group: Int[Array, "*B S"]
    segment: Int[Array, "*B S"]
    position: Int[Array, "*B S A"]
    relation: Bool[Array, "B S S"] | None = None


# --------------------------------------------------------------------------- corruption processes


@struct.dataclass
class Noised:
    """q(x_t | x_0) sampled once, with every target that a parameterization may need (keys: PARAMETERIZATIONS)."""

    xt: Float[Array, "B N P"]
    targets: dict[str, Float[Array, "B N P"]]
    changed: Bool[Array, "B N"]


@struct.dataclass
class Prediction:
    """What a network says about x_t: `value` in the process's parameterization, `variance` raw logits if learned."""

    value: Float[Array, "B N P"]
    variance: Float[Array, "B N P"] | None = None


@struct.dataclass
class Estimate:
    """One prediction expressed in every parameterization."""

    x0: Float[Array, "B N P"]
    eps: Float[Array, "B N P"]
    v: Float[Array, "B N P"]
    velocity: Float[Array, "B N P"]
    score: Float[Array, "B N P"]
    variance: Float[Array, "B N P"] | None = None


@runtime_checkable
class Process(Protocol):
    """A corruption process: frozen, without parameters of its own.

    `parameterization` says which of its targets the network predicts, `schedule` and `variance` how.
    """

    schedule: Any
    parameterization: str
    variance: str

    def prior(self, key: Array, shape: tuple[int, ...]) -> Array: ...

    def corrupt(self, key: Array, x0: Array, t: Array) -> Noised: ...

    def convert(self, prediction: Prediction, xt: Array, t: Array) -> Estimate: ...

    def posterior(self, key: Array, xt: Array, estimate: Estimate, t: Array, s: Array) -> Array: ...

    def time_input(self, t: Array) -> Array: ...


# --------------------------------------------------------------------------- sampling


Denoise = Callable[[Array, Array], Estimate]  # (xt [B, N, P], t scalar) -> Estimate; hides network, cache and guidance


@runtime_checkable
class StepSampler(Protocol):
    """One reverse step. `times` is decreasing, `[steps + 1]`, and ends at 0."""

    def times(self, process: Process, steps: int) -> Array: ...

    def init(self, process: Process, xt: Array) -> PyTree: ...

    def step(
        self, process: Process, key: Array, denoise: Denoise, xt: Array, t: Array, s: Array, state: PyTree
    ) -> tuple[Array, PyTree]: ...


# --------------------------------------------------------------------------- objectives


@struct.dataclass
class LossTerm:
    """A sum and the number of things summed; the step divides, after adding over accumulation and devices.

    What is not `trained` is logged like a loss and adds nothing to it.
    """

    total: Float[Array, ""]
    count: Float[Array, ""]
    trained: bool = struct.field(pytree_node=False, default=True)

    def __add__(self, other: LossTerm) -> LossTerm:
        return LossTerm(self.total + other.total, self.count + other.count, self.trained)


@struct.dataclass
class View:
    """One row-batch as the network gets it: the inputs of each segment and the times of the noised ones.

    inputs   by segment name: ids `[B, N]` (text), vectors `[B, N, P]` (image) or features `[B, N, F]` (vision)
    valid    by segment name: `[B, N]`; absent means all valid
    times    by image segment name: process time `[B, T]`, already mapped by `Process.time_input`; absent = clean
    labels   class index `[B]` or None
    places   of packed rows; their images are `[B, M, N, P]` with times `[B, M]`, their only `valid` `[B, S]` is that
             of all slots
    grids    by image segment name: rows and columns of patches, `[B, 2]` or `[B, M, 2]`; absent: those of the model
    """

    inputs: dict[str, Array]
    valid: dict[str, Array]
    times: dict[str, Array]
    labels: Array | None = None
    places: PlaceField | None = None
    grids: dict[str, Array] | None = None


@struct.dataclass
class Hidden:
    """The trunk's output for the rows of one task, and the conditioning vector of each image segment.

    Packed rows have `places`, M images of a segment `[B, M, N, D]`, and a vector for each.
    """

    sequence: Float[Array, "B S D"]
    valid: Bool[Array, "B S"]
    vectors: dict[str, Float[Array, "B T D"]]
    layout: Any = struct.field(pytree_node=False)  # sequence.layout.Layout
    places: PlaceField | None = None

    def of(self, name: str) -> Float[Array, "B N D"] | Float[Array, "B M N D"]:
        """Hidden states of one segment."""
        if self.places is not None:
            return self.layout.states(self.sequence, self.places, name)
        return self.sequence[:, self.layout.slices()[name]]

    def before(self, name: str) -> tuple[Float[Array, "B N D"], Bool[Array, "B N"]]:
        """The hidden state that precedes each token of a segment (what predicts it), and whether there is one."""
        if self.places is not None:
            return self.layout.before(self.sequence, self.valid, self.places)
        where = self.layout.slices()[name]
        sequence, valid = (jnp.pad(a, [(0, 0), (1, 0)] + [(0, 0)] * (a.ndim - 2)) for a in (self.sequence, self.valid))
        return sequence[:, where], valid[:, where]


@runtime_checkable
class Net(Protocol):
    """The only door to parameters (`models/model.py`). `views` holds (layout, view) by task; tasks whose rows have one
    length share one trunk pass."""

    def hidden(self, views: Mapping[str, tuple[Any, View]]) -> dict[str, Hidden]: ...

    def text_logits(self, hidden: Array) -> Array: ...

    def text_nats(self, hidden: Array, ids: Array) -> Array: ...

    def text_divergence(self, hidden: Array, teacher: Net, taught: Array, temperature: float) -> Array: ...

    def teacher(self) -> Net: ...

    def image_prediction(self, hidden: Array, vector: Array) -> Prediction: ...

    def start_cache(self, layout: Any, rows: int) -> PyTree: ...

    def extend(self, layout: Any, part: Any, start: int, view: View, cache: PyTree) -> tuple[Hidden, PyTree]: ...

    def extend_token(
        self, layout: Any, ids: Array, valid: Array, slot: Array, cache: PyTree
    ) -> tuple[Array, PyTree]: ...


@runtime_checkable
class Objective(Protocol):
    """Owns some fields of a task: `prepare` may replace their inputs (noise, masks), `loss` reads the trunk's output.

    The forward pass lies between the two, shared by all objectives of all tasks.
    """

    fields: tuple[str, ...]

    def prepare(self, view: View, batch: Batch, key: Array, train: bool) -> tuple[View, PyTree]: ...

    def loss(self, net: Net, hidden: Hidden, batch: Batch, aux: PyTree) -> dict[str, LossTerm]: ...


# --------------------------------------------------------------------------- data


@runtime_checkable
class Codec(Protocol):
    """Raw field <-> tokens. Host codecs (text) work in numpy inside Grain, device codecs (patch) inside the step."""

    def encode(self, value: Any) -> Any: ...

    def decode(self, tokens: Any) -> Any: ...


@runtime_checkable
class Task(Protocol):
    """A data source with its layout. `element_spec` alone is enough to initialise, shard and compile.

    segments     the spans of a row, in order
    image_shape  (h, w, C) of its images, or None; classes: number of class labels, or None

    How rows are read (`rows`, `read`, `build`) is `data.source.Source`, which every task also is.
    """

    segments: tuple[Any, ...]
    image_shape: tuple[int, int, int] | None
    classes: int | None

    def element_spec(self, batch: int) -> dict[str, Field]: ...

    def iterator(self, split: str, batch: int, seed: int, shard: tuple[int, int]) -> Iterator[dict[str, Field]]: ...

    def fake(self, batch: int, seed: int) -> dict[str, Field]: ...
