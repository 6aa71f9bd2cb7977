"""The state of a run's checkpoint, for a system that is sampled from or measured."""

from __future__ import annotations

from typing import Any

from src.train import loop
from src.train.average import check_chosen
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config
from src.train.posthoc import with_posthoc
from src.train.state import TrainState
from src.train.system import System
from src.train.trainer import make_trainer


def restore_checkpoint(
    system: System, workdir: str, which: str = "latest", changed: dict[str, Any] | None = None
) -> TrainState:
    """The state of a checkpoint: `which` is a step, latest or best. Only what shapes the network must agree with the
    config.

    With `eval.width` it has the average of that width, too (`posthoc.py`). What differs from the config of the
    checkpoint, (old, new) by field, is put into `changed`.

    Raises FileNotFoundError where there is no checkpoint, ValueError where the config does not fit it.
    """
    check_chosen(system.config, afterwards=True)
    checkpoints = Checkpointer(workdir, **system.config.checkpoint, readonly=True)
    step, identity = checkpoints.choose(which), system.identity()
    free = (*loop.ELASTIC, *(name for name in identity if name not in ("model", "fields", "codecs")))

    def accept(saved: Any) -> None:
        found = check_config(saved, identity, free)
        if changed is not None:
            changed.update(found)

    found = checkpoints.restore(make_trainer(system).abstract, accept, step)
    if found is None:
        raise FileNotFoundError(f"there is no checkpoint in {workdir}; train first, or correct --workdir")
    checkpoints.close()
    return with_posthoc(found[0], system.config, workdir)
