"""The parameters of a run, as they are read for an export, and as initial weights of another run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from src.models.pretrained.about import about_run
from src.models.pretrained.initial_weights import summary, write_initial
from src.models.pretrained.llama_weights import IMAGE
from src.train.average import check_average
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.read_params import CheckpointParams


def find_trained(workdir: epath.Path, options: Any) -> CheckpointParams:
    """The parameters of the checkpoint that the options name.

    Raises FileNotFoundError when there is none, and ValueError as `Checkpointer.choose` and `CheckpointParams` do.
    """
    opened = Checkpointer(workdir, readonly=True)
    latest = opened.latest_step()
    if latest is None:
        raise FileNotFoundError(f"there is no checkpoint in {workdir}: train first, or correct --source")
    if options.step == "best":
        newest = CheckpointParams(opened.directory / str(latest))
        step = Checkpointer(workdir, best=newest.config["checkpoint"]["best"], readonly=True).choose("best")
    else:
        step = opened.choose(options.step)
    step = latest if step is None else step
    if step not in opened.all_steps():
        raise FileNotFoundError(f"there is no checkpoint of step {step} in {workdir}; there are {opened.all_steps()}")
    found = CheckpointParams(opened.directory / str(step), options.ema)
    if options.ema:
        check_average(found.config["ema"], found.step, "the export")
    return found


def write_trained(run: CheckpointParams, out: str | os.PathLike[str], shard_bytes: int) -> Iterator[str]:
    """Writes the parameters of a run as they are into a folder for `config.init_from`, and says so in a line."""
    images = any(path.startswith(f"{IMAGE}/") for path in run.shapes)
    name = write_initial(out, run, about_run(run.config, images), None, shard_bytes)
    yield f"{out}: {summary(run.shapes)['parameters']:,} parameters of step {run.step:,}, hash {name}"
