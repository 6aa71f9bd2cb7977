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
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

from jaxtyping import Array
from ml_collections import ConfigDict

from src.common.lookup import build
from src.interfaces import FieldSpec


@runtime_checkable
class Link(Protocol):
    """One step of a codec. A host link has what its template calls; a device link has `encode` and `decode` of values
    with a leading axis of rows; a frozen one is described in `vae_latents.py`.

    where   "host", "frozen" or "device"
    shape   of one value behind this link, (h, w, C) say; () for text, whose length the templates say
    spec    of the tokens, None while values are no tokens yet
    """

    where: ClassVar[str]
    shape: tuple[int, ...]
    spec: FieldSpec | None


@dataclasses.dataclass(frozen=True)
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

    def decode(self, tokens: Array) -> Array:
        """The inverse of `encode`, as far as there is one."""
        for link in reversed(self.device):
            tokens = link.decode(tokens)
        return tokens

    @property
    def fingerprint(self) -> dict[str, Any]:
        """By link, what gives its tokens their meaning beside the config: of tokenizers, networks, learned codes."""
        names = {type(link).__name__: getattr(link, "fingerprint", None) for link in self.links}
        return {name: value() if callable(value) else value for name, value in names.items() if value is not None}


def build_chain(links: Sequence[Mapping[str, Any]], where: str) -> Chain:
    """The chain of a list of groups of the config; every link but the first is built with the one `before` it.

    Raises ValueError, naming the link, for what its class refuses.
    """
    links = [links] if isinstance(links, Mapping | ConfigDict) else list(links)
    built: list[Any] = []
    for number, group in enumerate(links):
        extra = {"before": built[-1]} if built else {}
        built.append(build("codecs", group, where=f"{where}.{number}", **extra))
    try:
        return Chain(tuple(built))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
