"""Weights & Biases (https://docs.wandb.ai). Its environment decides where runs go: WANDB_MODE=offline writes them to
`<workdir>/wandb` alone, to be sent later by `wandb sync`; WANDB_PROJECT, WANDB_ENTITY and WANDB_API_KEY are its own."""

from __future__ import annotations

import html
import os
import secrets
import tempfile
from collections.abc import Mapping
from typing import Any, ClassVar

from src.common.files.store import is_remote
from src.common.runtime.tracker import RUNS, Tracker

STEP = "trainer/step"  # of the run: W&B's own counter could not go back to the step of a checkpoint


class WandB(Tracker):
    """A run of W&B with the config, curves over the run's own steps, images and texts."""

    NAME: ClassVar[str] = "wandb"
    PACKAGE: ClassVar[str] = "wandb"

    def open(self, run: str | None) -> tuple[Any, str]:
        """The run of that id, which the service may not know yet, or a new one."""
        import wandb

        remote = is_remote(self.workdir)
        handle = wandb.init(
            project=os.environ.get("WANDB_PROJECT", RUNS),
            name=self.workdir.name,
            id=run or secrets.token_hex(4),
            resume="allow",
            dir=tempfile.mkdtemp(prefix="wandb-") if remote else str(self.workdir),
            config=self.config,
            allow_val_change=True,
            settings=wandb.Settings(console="off", silent=True, disable_git=True),
        )
        handle.define_metric(STEP)
        handle.define_metric("*", step_metric=STEP)
        return handle, handle.id

    def send(self, handle: Any, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One entry of the history."""
        import wandb

        made = {
            "scalars": lambda value: value,
            "images": wandb.Image,
            "texts": lambda text: wandb.Html(f"<pre>{html.escape(text)}</pre>"),
        }[kind]
        handle.log({STEP: step} | {name: made(value) for name, value in values.items()})

    def end(self, handle: Any) -> None:
        """Sends the rest, and waits for W&B's own process, which writes its files until it ends."""
        import wandb

        handle.finish()
        wandb.teardown()
