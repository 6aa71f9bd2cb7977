"""The codec of a field: a chain of links between raw values and tokens.

A link is a file of this folder. The first one takes what a source gives; every later one is built with `before`, the
link in front of it, and reads that one's `shape`, or `spec` once values are tokens. Links run in this order, each kind
of them may be absent:

    host      numpy, in the data pipeline: text -> ids, an image file's pixels -> [h, w, C]
    frozen    a network that is not trained, with parameters of its own (`params`), in a program before the train step;
              `takes` is the shape of what it is given
    device    JAX, inside the train step: patches, k-means, counts
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, ClassVar, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jaxtyping import Array, Int

from src.common.lookup import build, nearest
from src.interfaces import FieldSpec, Tokens


@runtime_checkable
class Link(Protocol):
    """One step of a codec. A host link has what its template calls; a device link has `encode` and `decode` of values
    with a leading axis of rows; a frozen one is described in `_frozen.py`.

    where   "host", "frozen" or "device"
    shape   of one value behind this link, such as (h, w, C); () for text, whose length is the template's
    spec    of the tokens, None while values are no tokens yet
    """

    where: ClassVar[str]
    shape: tuple[int, ...]
    spec: FieldSpec | None


@dataclasses.dataclass(frozen=True, eq=False)  # equal to itself alone, so that programs are kept by codec
class Chain:
    """Links in order. Raises ValueError when they are in another order than host, frozen, device, or give no tokens."""

    links: tuple[Any, ...]

    def __post_init__(self):
        order = [("host", "frozen", "device").index(link.where) for link in self.links]
        if order != sorted(order) or order.count(1) > 1:
            names = ", ".join(f"{type(link).__name__} ({link.where})" for link in self.links)
            raise ValueError(f"a codec has the links {names}: host, then at most one frozen network, then device")
        if not self.links or self.links[-1].spec is None:
            raise ValueError("a codec's last link gives no tokens: add one, as {'name': 'patch', 'size': 2}")

    @property
    def spec(self) -> FieldSpec:
        """Of the tokens."""
        return self.links[-1].spec

    @property
    def host(self) -> Any:
        """The first link, which runs in the data pipeline: a text codec, or `pixels`."""
        return self.links[0]

    @property
    def delivered(self) -> tuple[int, ...]:
        """Shape of one value as the data deliver it: of the host's link, or what a network's `preprocess` gives."""
        return self.host.takes if self.host.where == "frozen" else self.host.shape

    @property
    def frozen(self) -> Any:
        """The network that runs before the train step, or None."""
        return next((link for link in self.links if link.where == "frozen"), None)

    @property
    def device(self) -> tuple[Any, ...]:
        """The links inside the train step."""
        return tuple(link for link in self.links if link.where == "device")

    def encode(self, value: Array) -> Array:
        """Tokens [B, N, …] of what the step gets, [B, …]: the device links alone."""
        for link in self.device:
            value = link.encode(value)
        return value

    def decode(self, tokens: Array, grid: tuple[int, ...] | None = None) -> Array:
        """The inverse of `encode`, as far as there is one; `grid`: of the tokens, where it is not that of the field."""
        for link in reversed(self.device):
            other = grid is not None and grid != self.spec.grid and hasattr(link, "shaped")
            tokens = (link.shaped(grid) if other else link).decode(tokens)
        return tokens

    @property
    def fingerprint(self) -> dict[str, Any]:
        """By link, what gives its tokens their meaning beside the config: of tokenizers, networks, learned codes."""
        names = {type(link).__name__: getattr(link, "fingerprint", None) for link in self.links}
        return {name: value() if callable(value) else value for name, value in names.items() if value is not None}


@functools.partial(jax.jit, static_argnums=0)
def encode_compiled(codec: Any, value: Array) -> Array:
    """`codec.encode` as one program, for callers outside of one, where each operation would be compiled by itself."""
    return codec.encode(value)


@functools.partial(jax.jit, static_argnums=(0, 2))
def decode_compiled(codec: Any, tokens: Array, grid: tuple[int, ...] | None = None) -> Array:
    """`codec.decode` as one program."""
    return codec.decode(tokens, grid)


def encoded(codec: Any, tokens: Tokens) -> Tokens:
    """Tokens [B, N] or, of packed rows, [B, M, N], after the device links of their codec, in the order of their
    `place`; vectors that are padding are zeros."""
    value, valid = jnp.asarray(tokens.value), jnp.asarray(tokens.valid)
    outer = valid.ndim - 1
    if codec is not None and codec.device:
        flat = codec.encode(value.reshape(-1, *value.shape[outer:]))
        value = flat.reshape(*value.shape[:outer], *flat.shape[1:])
    if tokens.place is not None and codec is not None and codec.spec.grid:
        number = row_major_numbers(jnp.asarray(tokens.place))
        value = jnp.take_along_axis(value, number.reshape(*number.shape, *[1] * (value.ndim - number.ndim)), axis=outer)
    if value.ndim > valid.ndim:
        value = jnp.where(valid.reshape(*valid.shape, *[1] * (value.ndim - valid.ndim)), value, 0)
    return tokens.replace(value=value)


def row_major_numbers(place: Int[Array, "*B N axes"]) -> Int[Array, "*B N"]:
    """Number of each token in the row-major order of the grid that the places of its row fill."""
    sides = place.max(axis=-2, keepdims=True) + 1
    number = jnp.zeros_like(place[..., 0])
    for axis in range(place.shape[-1]):
        number = number * sides[..., axis] + place[..., axis]
    return number


STAGES = ("host", "frozen", "device", "codes")  # the last one is a device link, too
Samples = Callable[[str, Any], Any]  # (texts | values, the first link) -> what a link may learn from; has `about`


def build_chain(codec: Any, where: str, samples: Samples) -> Chain:
    """The chain of a group of the config: one link with a `name`, or a link for some of the STAGES, or a list of links.

    Every link but the first is built with the one `before` it, and one that has to be learned (`learns`, `unfitted`,
    `fit`) is, from the training data in front of it.
    Raises ValueError, naming the link, for what its class refuses, for an unknown stage, and for one that would have to
    learn behind a frozen network.
    """
    built: list[Any] = []
    groups = _groups(codec, where)
    for key, group in groups.items():
        extra = {"before": built[-1]} if built else {}
        link = build("codecs", group, where=key, **extra)
        if getattr(link, "unfitted", False):
            learn(link, built, samples, key, about=str(list(groups.values())[: len(built) + 1]))
        built.append(link)
    try:
        return Chain(tuple(built))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def learn(link: Any, before: list[Any], samples: Samples, where: str, about: str) -> None:
    """Fits a link to the training data, as the links `before` it give them.

    A link that has `recall` takes what was learned before of these options (`about`) when the data cannot be read.
    """
    if frozen := next((each for each in before if each.where == "frozen"), None):
        raise ValueError(
            f"{where} cannot be learned behind the frozen {type(frozen).__name__}, which runs in training only: give a"
            " path to what was learned already, or leave out one of the two"
        )
    about = f"{about}\n{getattr(samples, 'about', '')}"
    try:
        values = samples(link.learns, before[0] if before else link)
    except (OSError, ValueError) as error:
        if not (hasattr(link, "recall") and link.recall(about)):
            raise
        logging.warning("%s: what was learned earlier is used, because the data cannot be read (%s)", where, error)
        return
    for earlier in before[1:]:
        values = earlier.encode(jnp.asarray(values))
    if link.learns == "texts":
        link.fit(values)
    else:
        link.fit(np.asarray(values).reshape(-1, values.shape[-1]), about)


def _groups(codec: Any, where: str) -> dict[str, Any]:
    """The links' groups in order, by their paths in the config."""
    if isinstance(codec, list | tuple):
        return {f"{where}[{number}]": group for number, group in enumerate(codec)}
    if not hasattr(codec, "keys"):
        raise ValueError(f"{where}={codec!r} is no codec: give a group with a name, or some of {', '.join(STAGES)}")
    if "name" in codec:
        return {where: codec}
    if unknown := [key for key in codec if key not in STAGES]:
        like = {key: nearest(str(key), ("name", *STAGES)) for key in unknown}
        unknown.sort(key=lambda key: not like[key])  # what is misspelt explains the others
        meant = like[unknown[0]]
        hint = f" (did you mean {meant}?)" if meant else ""
        raise ValueError(f"{where} has no stage {unknown[0]!r}{hint}; it has a name, or some of {', '.join(STAGES)}")
    return {f"{where}.{stage}": codec[stage] for stage in STAGES if stage in codec}
