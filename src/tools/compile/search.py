"""What else would fit: candidates of mesh, recomputation and microbatches, and reports of those that were compiled."""

from __future__ import annotations

import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from src.build import build_system
from src.models.transformer import REMAT
from src.tools.compile import estimate
from src.tools.compile.report import train_report
from src.tools.compile.topology import Topology


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A change of the config, with its estimated bytes on one device."""

    fsdp: int
    remat: str
    batch: int
    accumulate: int
    estimate: int

    def flags(self, config: Any) -> str:
        """What it changes, as flags of the command line."""
        now = (config.mesh.get("fsdp", 1), config.model.trunk.remat, config.batch, config.accumulate)
        names = ("mesh.data=-1 --config.mesh.fsdp", "model.trunk.remat", "batch", "accumulate")
        new = (self.fsdp, self.remat, self.batch, self.accumulate)
        changed = [f"--config.{n}={b}" for n, a, b in zip(names, now, new, strict=True) if a != b]
        return " ".join(changed) or "the config as it is"

    def apply(self, config: Any) -> Any:
        """The changed config."""
        changed = config.copy_and_resolve_references()
        with changed.unlocked():
            changed.mesh.data, changed.mesh.fsdp = -1, self.fsdp
            changed.model.trunk.remat, changed.batch, changed.accumulate = self.remat, self.batch, self.accumulate
        return changed


def candidates(config: Any, topology: Topology, hbm: float, batches: Sequence[int] = ()) -> list[Candidate]:
    """Those whose rows divide, by estimate: first what fits, with the least recomputation and splitting, then the rest.

    Axes of the mesh other than `data` and `fsdp` stay as they are. Fewer microbatches come first.
    """
    system, devices = build_system(config), len(topology.devices)
    fixed = {name: size for name, size in config.mesh.items() if name not in ("data", "fsdp")}
    free = devices // math.prod(fixed.values())
    ways = [n for n in range(1, free + 1) if free % n == 0]
    encoders = system.encoder_bytes()
    found = []
    for fsdp, remat, batch, parts in itertools.product(ways, REMAT, batches or [config.batch], (1, 2, 4, 8)):
        if batch % (free * parts):
            continue
        mesh = {"data": free // fsdp, "fsdp": fsdp} | fixed
        size = encoders + estimate.estimate_bytes(system, mesh, remat, batch / config.batch / parts)
        found.append(Candidate(fsdp, remat, batch, parts, size))
    limit = hbm * topology.share
    order = list(REMAT)

    def rank(c: Candidate) -> tuple:
        fits = c.estimate <= limit
        return (not fits, *((c.accumulate, order.index(c.remat), c.fsdp) if fits else (c.estimate,)))

    return sorted(found, key=rank)


def suggestion(config: Any, topology: Topology, hbm: float) -> str:
    """One sentence: the smallest change that fits by estimate."""
    fitting = [c for c in candidates(config, topology, 0.8 * hbm) if c.estimate <= 0.8 * hbm * topology.share]
    if not fitting:
        return "by estimate nothing fits on this slice: take more chips, a smaller batch or mesh.tensor"
    best = min(fitting, key=lambda c: (c.flags(config).count("--"), c.accumulate, c.fsdp))
    return f"{best.flags(config)} should fit, with about {best.estimate / 2**30:.1f} GiB (estimate; --search compiles)"


def search(config: Any, topology: Topology, hbm: float, limit: int, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Reports of the first `limit` candidates, compiled one after the other; progress on standard error."""
    chosen, encoders = candidates(config, topology, hbm, batches)[:limit], {}
    for number, candidate in enumerate(chosen, 1):
        what = candidate.flags(config)
        print(f"{number}/{len(chosen)} {what}", file=sys.stderr, flush=True)
        try:
            report = train_report(candidate.apply(config), topology, hbm, encoders)
        except ValueError as error:
            print(f"  refused: {error}", file=sys.stderr)
            continue
        changes = dataclasses.asdict(candidate)
        yield {"change": what, **{k: v for k, v in changes.items() if k != "estimate"}} | report
