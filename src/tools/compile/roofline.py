"""How long a program takes at least on a chip: arithmetic, memory traffic and network, each at its published peak."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from src.tools.compile.hlo import Collective
from src.tools.compile.topology import Topology

ASSUMPTIONS = (
    "compute: the larger of the program's matrix products and the model's FLOPs, at peak bf16; nothing else.",
    "  A product of float32 at the highest precision counts as six of bf16",
    "hbm: what the program's instructions read and write in main memory, at the published rate",
    "network: ring algorithms without latency; every link of a mesh axis at its full rate in one direction,",
    "  two links in a dimension that is a ring, one where it is a line; slices exchange what one slice has reduced",
    "best case: the three overlap and the longest counts; worst case: they follow each other",
)


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one execution, by what limits it."""

    compute: float
    hbm: float
    network: float

    @property
    def best(self) -> float:
        """All three overlap."""
        return max(self.compute, self.hbm, self.network)

    @property
    def worst(self) -> float:
        """They follow each other."""
        return self.compute + self.hbm + self.network


def roofline(flops: float, traffic: float, found: Sequence[Collective], topology: Topology, mesh: Any) -> Roofline:
    """The times of one device's program: FLOPs, bytes of main memory, collectives.

    Raises ValueError when collectives cross slices of a chip without published data-centre bandwidth.
    """
    chip, share = topology.chip, topology.share
    network = sum(c.times * _network(c, topology, mesh) for c in found)
    return Roofline(flops / (chip.flops * share), traffic / (chip.hbm_rate * share), network)


def _network(collective: Collective, topology: Topology, mesh: Any) -> float:
    """Seconds of one execution of a collective."""
    members = _members(mesh, collective.axes)
    slices = len({getattr(d, "slice_index", 0) or 0 for d in members})
    seconds = 0.0
    if len(members) > slices:
        seconds += collective.bytes / (_links(members, topology) * topology.chip.link)
    if slices > 1:
        if topology.chip.dcn is None:
            raise ValueError(f"no data-centre bandwidth of {topology.chip.name} is published; use --slices=1")
        seconds += collective.bytes / (len(members) / slices) / (topology.chip.dcn * topology.share)
    return seconds


def _members(mesh: Any, axes: Sequence[str]) -> list[Any]:
    """The devices of the first group that spans these axes."""
    place = tuple(slice(None) if name in axes else 0 for name in mesh.axis_names)
    return list(np.ravel(mesh.devices[place]))


def _links(members: Sequence[Any], topology: Topology) -> int:
    """Links on which one chip of a group can receive at once."""
    if not all(hasattr(d, "coords") for d in members):
        return 2  # emulated devices: as if on one ring
    places = np.array([tuple(d.coords) for d in members])[:, : len(topology.sizes)]
    extents = [len(set(column)) for column in places.T]
    links = 0
    for dimension, extent in enumerate(extents):
        whole = extent == topology.sizes[dimension]
        if extent > 1:
            links += 2 if whole and topology.chip.closed(topology.sizes, dimension) else 1
    return links or 2 * len(topology.sizes)  # the two halves of one chip
