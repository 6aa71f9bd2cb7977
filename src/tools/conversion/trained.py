"""The parameters of a run, as they are read for an export, and as initial weights of another run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from src.models.pretrained.about import about_run
from src.models.pretrained.initial_weights import summary, write_initial
from src.models.pretrained.llama_weights import IMAGE
from src.train.average import check_average, further, name_of
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.read_params import CheckpointParams
from src.train.posthoc import PosthocAverage, read_posthoc


def find_trained(workdir: epath.Path, options: Any) -> CheckpointParams | PosthocAverage:
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
    folder = opened.directory / str(step)
    if options.decay or options.width:
        return _average(workdir, folder, options)
    found = CheckpointParams(folder, options.ema)
    if options.ema:
        check_average(found.config["ema"], found.step, "the export")
    return found


def _average(workdir: epath.Path, folder: epath.Path, options: Any) -> CheckpointParams | PosthocAverage:
    """The average that --decay or --width names."""
    if options.decay and options.width:
        raise ValueError(f"--decay={options.decay} and --width={options.width} name two averages: give one of them")
    kind, value = ("decay", options.decay) if options.decay else ("width", options.width)
    config, step = (last := CheckpointParams(folder)).config, last.step
    if kind == "width" and name_of(kind, value) not in further(config["ema"]):
        return read_posthoc(workdir, value, step)
    usual = kind == "decay" and value == config["ema"]["decay"]
    found = CheckpointParams(folder, True if usual else name_of(kind, value))
    if kind == "decay":
        check_average(config["ema"] | {"decay": value}, step, "the export")
    return found


def write_trained(
    run: CheckpointParams | PosthocAverage, out: str | os.PathLike[str], shard_bytes: int
) -> Iterator[str]:
    """Writes the parameters of a run as they are into a folder for `config.init_from`, and says so in a line."""
    images = any(path.startswith(f"{IMAGE}/") for path in run.shapes)
    name = write_initial(out, run, about_run(run.config, images), None, shard_bytes)
    yield f"{out}: {summary(run.shapes)['parameters']:,} parameters of step {run.step:,}, hash {name}"
