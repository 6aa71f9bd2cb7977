"""The average of any width, made of the two power averages that the checkpoints of a run keep."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from src.common.files.lazy_arrays import place
from src.common.tree import flatten, rebuild
from src.train.average import AVERAGES, chosen, further, name_of
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.read_params import CheckpointParams
from src.train.power_average import combination, distance, exponent_of
from src.train.state import TrainState

FAR = 0.05  # share of the profile that may be missing before a warning


class PosthocAverage:
    """The average of a width after `step` steps as `Leaves`: a sum of the averages in `snapshots`.

    snapshots   of each (width, step) that was kept, the parameters of that average
    """

    def __init__(self, snapshots: Mapping[tuple[float, int], CheckpointParams], width: float, step: int):
        kept = sorted(snapshots)
        exponents, steps = [exponent_of(each) for each, _ in kept], [at for _, at in kept]
        self.weights = combination(exponents, steps, exponent_of(width), step)
        self.distance = distance(exponents, steps, exponent_of(width), step)
        self._parts = [snapshots[each] for each in kept]
        newest = snapshots[max(kept, key=lambda each: each[1])]
        self.shapes, self.config, self.step, self.version = newest.shapes, newest.config, step, newest.version

    def blocks(self, path: str) -> Iterator[np.ndarray]:
        """See `Leaves`. Checkpoints are read one after the other, and added up in float64."""
        sums: list[np.ndarray] = []
        for weight, part in zip(self.weights, self._parts, strict=True):
            for number, piece in enumerate(part.blocks(path)):
                added = weight * np.asarray(piece, np.float64)
                if number == len(sums):
                    sums.append(added)
                else:
                    sums[number] += added
        return (block.astype(self.shapes[path].dtype) for block in sums)


def read_posthoc(workdir: str | os.PathLike[str], width: float, step: int) -> PosthocAverage:
    """The average of a width after `step` steps, of the checkpoints up to it; a warning where it is not near.

    Raises ValueError, in one sentence, where the checkpoints keep no two power averages.
    """
    opened = Checkpointer(workdir, readonly=True)
    found: dict[tuple[float, int], CheckpointParams] = {}
    for at in sorted(each for each in opened.all_steps() if each <= step):
        folder = epath.Path(opened.directory) / str(at)
        widths = _widths(CheckpointParams(folder).config)
        found |= {(one, at): CheckpointParams(folder, name_of("width", one)) for one in widths}
    if len({one for one, _ in found}) < 2:
        raise ValueError(
            f"the width {width} cannot be made for {os.fspath(workdir)}: its checkpoints keep no two power averages; "
            "train with ema.power=(0.05, 0.1) and checkpoint.keep_every"
        )
    made = PosthocAverage(found, width, step)
    if made.distance > FAR:
        logging.warning(
            "the average of width %s after %d steps is made of %d checkpoints and misses %.0f %% of its profile: keep "
            "more of them (checkpoint.keep_every), or choose a width nearer to those of ema.power",
            width, step, len({at for _, at in found}), 100 * made.distance,
        )  # fmt: skip
    return made


def with_posthoc(state: TrainState, config: Any, workdir: str) -> TrainState:
    """The state with the average that `config.eval.width` names, if it names one that the run does not keep."""
    wanted = chosen(config) if config.eval.ema else None
    if wanted is None or wanted[0] != "width" or name_of(*wanted) in further(config.ema):
        return state
    made = read_posthoc(workdir, wanted[1], int(state.step))
    leaves = {path: place(made, path, leaf.dtype, leaf.sharding) for path, leaf in flatten(state.ema).items()}
    averages = state.extra.get(AVERAGES, {}) | {name_of(*wanted): rebuild(leaves, state.ema)}
    return state.replace(extra=state.extra | {AVERAGES: averages})


def _widths(config: Mapping[str, Any]) -> Sequence[float]:
    return [value for kind, value in further(config["ema"]).values() if kind == "width"]
