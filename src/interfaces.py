"""The contracts between the floors, and the glossary of letters. No name below is a modality. The structures that they
speak of are in `structs.py`.

Shapes:  B batch · S sequence · N tokens of one segment · D width · H heads · K kv heads · V vocabulary
         P numbers of one token (patch features, latents, code groups) · C numbers of a condition · A rotary axes
         L layers · M parts of one name in a packed row · T times of one row (1, or N when every token has its own)

Time:    t in [0, 1] everywhere; t = 0 is clean data, t = 1 is noise. A discrete process with n steps puts its
         index k (0 … n-1) at t = (k + 1) / n.

Words:   field     a row of the table `config.fields`: codec -> embed -> process -> head -> step sampler
         name      a part of a row of data; its field is what stands before the dot: "text.question" -> "text"
         segment   a span of the sequence with one name, or with several that share its tokens
         target    a token that is to be made: trained on, or sampled; every other token is given
         clean, noisy   the two copies of a name that the network may read
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from flax import struct
from jaxtyping import Array, Float

from src.structs import Batch, Corrupted, FieldSpec, LossTerm, PyTree, SequenceSpec
from src.structs import Packing as Packing
from src.structs import Tokens as Tokens
from src.structs import row_of as row_of

# ---- sequence


@runtime_checkable
class Layout(Protocol):
    """Where the segments of a task's rows lie: in fixed places (`sequence/layout.py`), or where each row says
    (`sequence/packed.py`). Nobody else asks which of the two it is.

    segments       `sequence.segment.Segment`, in their order
    segment        the one that a name lies on; `part`, in fixed places, where a copy of a name lies in the row
    with_leads     the layout with so many tokens in front of each segment; `only`: of some of its segments
    parts_of       how many parts M of a name a row has room for; 1 in fixed places
    static_orders  `read`, `write`, `group`, numpy [S], as far as they are the same in every row
    block_of       number of the noisy block of each token of a name: numpy [N] where all rows are alike, else [B, N]
    valid          which slots of these rows are no padding [B, S]; `spec`: who sees whom in them
    join           [B, S, …] of the tokens of each (name, copy), [B, N, …] or packed [B, M, N, …]; copies are `clean`,
                   `noisy`, `lead` (of a segment's first name). The names of one segment add
    take           what a sequence [B, S, …] has at the tokens of a name
    before         what it has at the last valid clean token before each token of a name, and whether there is one
    """

    segments: tuple[Any, ...]

    @property
    def length(self) -> int: ...
    def segment(self, name: str) -> Any: ...
    def part(self, name: str, copy: str) -> Any: ...
    def with_leads(self, leads: Callable[[Any], int]) -> Layout: ...
    def only(self, keep: Callable[[Any], bool]) -> Layout: ...
    def parts_of(self, name: str) -> int: ...
    def static_orders(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]: ...
    def block_of(self, batch: Batch, name: str) -> Array | np.ndarray: ...
    def valid(self, batch: Batch) -> Array: ...
    def spec(self, batch: Batch) -> SequenceSpec: ...
    def join(self, batch: Batch, parts: Mapping[tuple[str, str], Array]) -> Array: ...
    def take(self, batch: Batch, sequence: Array, name: str, copy: str = "clean") -> Array: ...
    def before(self, batch: Batch, sequence: Array, name: str) -> tuple[Array, Array]: ...


# ---- corruption processes


@runtime_checkable
class Process(Protocol):
    """A corruption process of one field: frozen, without parameters. X0 are clean tokens, XT what lies between clean
    and noise (both may be trees), E what it concludes from a head's output.

    field      spec of what it corrupts
    inputs     spec of what the embedder reads: mask ids are on top of the vocabulary here, and nowhere else
    outputs    numbers per token that a head gives, unconstrained: links (softmax, softplus) are the process's
    guided     the first so many of them are what guidance acts on
    noise      all that `corrupt` draws for [B, N] tokens
    corrupt    deterministic; t = 0 gives x0 back bit for bit
    prior      x at t = 1; `past`: the finished blocks before
    network    what the embedder gets: value, and time of the shape of t (scaling, centring)
    estimate   a head's output -> E
    times      the decreasing times of `steps` reverse steps, [steps + 1], from noise to 0
    posterior  one draw of p(x_s | x_t); at s = 0 exact and finite
    clean      what is left at s = 0; mostly xt itself
    hint       what self-conditioning shows: x0, or probabilities
    state      of an adaptive schedule, kept in the train state (None: there is none); `bind` gives the process with it,
               `update` the state after a step, from the field's own untrained term
    """

    field: FieldSpec
    inputs: FieldSpec
    outputs: int
    guided: int

    def noise(self, key: Array, shape: tuple[int, int]) -> PyTree: ...
    def corrupt(self, x0: PyTree, noise: PyTree, t: Array) -> Corrupted: ...
    def prior(self, key: Array, shape: tuple[int, int], past: Array | None = None) -> PyTree: ...
    def times(self, steps: int) -> Array: ...
    def network(self, xt: PyTree, t: Array) -> tuple[Array, Array]: ...
    def estimate(self, output: Array, xt: PyTree, t: Array) -> PyTree: ...
    def posterior(self, key: Array, xt: PyTree, estimate: PyTree, t: Array, s: Array) -> PyTree: ...
    def clean(self, xt: PyTree) -> Array: ...
    def hint(self, estimate: PyTree) -> Array: ...
    def state(self) -> PyTree: ...
    def bind(self, state: PyTree) -> Process: ...
    def update(self, state: PyTree, term: LossTerm, step: Array) -> PyTree: ...


# ---- network

Guide = Callable[[Array, Array], Array]  # (output of pairs of rows, given and null, or of rows, t) -> guided output


@runtime_checkable
class Head(Protocol):
    """How hidden states of a field become numbers. What they mean is the process's, or, without one, that of `nll`.

    noise    all that `nll` draws for [B, N] tokens; mostly ()
    nll      -log p(target | hidden) or what stands for it, [B, N]; deterministic
    sample   the next token of each row from [B, D]; guidance acts inside, on outputs. `choose`: (key, logits) -> ids

    It may have `past`, a number K above 0: it also reads the K tokens of its field before the one that it makes. `nll`
    finds them in its targets; `sample` gets them as one more argument `past`, [B, K, …], zeros where there is none.
    """

    def __call__(self, hidden: Array, cond: Array | None = None) -> Array: ...
    def noise(self, key: Array, shape: tuple[int, int]) -> PyTree: ...
    def nll(self, hidden: Array, target: Array, noise: PyTree) -> Array: ...
    def sample(self, key: Array, hidden: Array, guide: Guide, choose: Callable[[Array, Array], Array]) -> Array: ...


@dataclasses.dataclass(frozen=True)
class Field:
    """A row of the table, from `config.fields.<name>`.

    spec        of the clean tokens
    codec       raw values <-> tokens: a chain (`codecs/chain.py`)
    process     None: only ever read, or made by its head token by token
    step        step sampler of the process
    noise       (key, (B, N)) -> all that the `nll` of its head draws
    hint        its embedder has a self-conditioning input
    timed       noisy tokens are told their time
    learned     its codec has a last part among the parameters, which gives what the process corrupts
    time_token  a time token stands before its segments, where the conditioning makes some
    """

    name: str
    spec: FieldSpec
    codec: Any
    process: Process | None = None
    step: Any = None
    noise: Callable[[Array, tuple[int, int]], PyTree] | None = None
    hint: bool = False
    timed: bool = True
    time_token: bool = False
    learned: bool = False


@struct.dataclass
class View:
    """What the network reads of one task: the clean batch, and beside it what objectives add.

    noisy    by name: x_t as the embedder gets it; a segment's role says which copy it reads
    times    by name: time of each row [B, 1] or token [B, N] as the embedder gets it; absent: clean, t = 0
    hints    by name: self-conditioning; absent must equal a hint of zeros
    """

    batch: Batch
    layout: Layout = struct.field(pytree_node=False)
    noisy: dict[str, Array] = struct.field(default_factory=dict)
    times: dict[str, Array] = struct.field(default_factory=dict)
    hints: dict[str, Array] = struct.field(default_factory=dict)


@struct.dataclass
class Hidden:
    """The trunk's output for the rows of one task, and the conditioning vectors by name, [B, T, D]."""

    view: View
    sequence: Float[Array, "B S D"]
    vectors: dict[str, Array]

    def of(self, name: str, copy: str | None = None) -> Array:
        """Hidden states of a name [B, N, D]; of the copy that noise is added to, unless another is wanted."""
        layout = self.view.layout
        copy = copy or ("noisy" if layout.segment(name).role == "copies" else "clean")
        return layout.take(self.view.batch, self.sequence, name, copy)

    def before(self, name: str) -> tuple[Array, Array]:
        """The state that predicts each token of a name, and whether there is one."""
        return self.view.layout.before(self.view.batch, self.sequence, name)


@runtime_checkable
class BoundField(Head, Protocol):
    """A row of the table with its parameters and its state; it is the field's head, too.

    past           number of tokens before the next one that its head reads
    encode         clean tokens as the process corrupts them: themselves, or what a learned codec makes of them;
                   `decode` back
    codec_losses   what a learned codec is trained on, by name, [B, N] each
    """

    field: Field
    process: Process
    past: int

    def encode(self, value: Array) -> PyTree: ...
    def decode(self, x0: PyTree) -> Array: ...
    def codec_losses(self, value: Array) -> dict[str, Array]: ...


@runtime_checkable
class Net(Protocol):
    """The only door to parameters (`models/model.py`). Tasks whose rows have one length share one trunk pass.

    field    the row of the table that a name belongs to
    extend   runs tokens start … start + size of a segment's copy over the cache; the caller keeps the new cache, or
             drops it. `view` has full-length values, `start` may be traced; leads go with a static start of 0. Gives
             the tokens' states [B, size, D] without leads
    vector   what conditions the tokens of a segment's copy, and the heads that read them: one a row or one a token
             [B, T, D]; None where nothing does
    teacher  the network with the parameters at the start of the run
    """

    def field(self, name: str) -> BoundField: ...
    def hidden(self, views: Mapping[str, View]) -> dict[str, Hidden]: ...
    def start_cache(self, view: View) -> PyTree: ...
    def extend(
        self, view: View, segment: Any, copy: str, start: Any, size: int, spec: SequenceSpec, cache: PyTree
    ) -> tuple[Array, PyTree]: ...
    def vector(self, view: View, segment: Any, copy: str) -> Array | None: ...
    def teacher(self) -> Net: ...


# ---- objectives and sampling


@runtime_checkable
class Loss(Protocol):
    """Losses of a process's output by name, [B, N] each; `target` are the clean tokens of the batch. `needs` may list
    members that only some processes have."""

    def __call__(self, process: Any, output: Array, c: Corrupted, target: Array) -> dict[str, Array]: ...


@runtime_checkable
class Objective(Protocol):
    """Owns some names of a task. `draw` is random and knows no parameters, for the whole batch before it is split;
    `prepare` is deterministic and lies inside the gradient; `loss` reads the trunk's output.

    It may say that it reads the state before each token (`predicts_next`), that it adds noise to its names
    (`adds_noise`), and that the run keeps a teacher for it (`taught`)."""

    names: tuple[str, ...]

    def draw(self, key: Array, fields: Mapping[str, Field], view: View) -> PyTree: ...
    def prepare(self, net: Net, view: View, draws: PyTree) -> tuple[View, PyTree]: ...
    def loss(self, net: Net, hidden: Hidden, aux: PyTree) -> dict[str, LossTerm]: ...


@runtime_checkable
class StepSampler(Protocol):
    """One reverse step. `times` is decreasing, `[steps + 1]`, and ends at 0; `again(xt, t)` is one more evaluation."""

    def times(self, process: Any, steps: int) -> Array: ...
    def init(self, process: Any, xt: PyTree) -> PyTree: ...
    def step(
        self,
        process: Any,
        key: Array,
        estimate: PyTree,
        xt: PyTree,
        t: Array,
        s: Array,
        state: PyTree,
        again: Callable[[PyTree, Array], PyTree],
    ) -> tuple[PyTree, PyTree]: ...


# ---- data


@runtime_checkable
class Task(Protocol):
    """Source x template (`data/task.py`). `element_spec` alone is enough to initialise, shard and compile.

    source      of the examples (`data/example.py`); `template`: what makes tokens of them (`data/templates`)
    layout      of its training rows
    fill        the names that are made; the others are given
    buckets     aspect ratios of the template's images, or None
    draws       uniform numbers that a training row is made with
    rows        how many rows a split has, bad ones included
    questions   examples of a split as prompts, without what is made; `invented_question`: one that needs no data
    prompt      rows to be completed, and their layout: a name in `fill` that an example lacks is to be made, one that
                it has is given; `null` drops the conditions, for guidance, where the task is `conditional`

    It may also have `latents_of`, the hash of the codec whose moments of latents its files hold; reading it opens them,
    and so it is no member that a type check would look at.
    """

    source: Any
    template: Any
    layout: Layout
    fill: tuple[str, ...]
    draws: int
    conditional: bool

    @property
    def buckets(self) -> Any: ...
    def rows(self, split: str) -> int: ...
    def element_spec(self, batch: int) -> Batch: ...
    def fake(self, batch: int, seed: int) -> Batch: ...
    def questions(self, count: int, split: str = "test") -> list[Any]: ...
    def invented_question(self) -> Any: ...
    def prompt(self, examples: Sequence[Any], null: bool = False) -> tuple[Layout, Batch]: ...
