"""Orbax's manager as it is used here: it writes checkpoints and lists them by the names of their folders alone."""

from __future__ import annotations

import datetime
from typing import Any

from etils import epath


def open_manager(directory: epath.Path, readonly: bool) -> Any:
    """A `CheckpointManager` that removes nothing by itself and opens no file of a checkpoint to list it.

    Orbax's own list reads the marker and the scores of every checkpoint and raises for one that holds something else,
    so that a single damaged checkpoint would hide all the others. What is removed is decided in `retention.py`.
    """
    import orbax.checkpoint as ocp

    steps = ocp.path.step
    plain = steps.standard_name_format()

    class Folder(steps.Metadata):
        """A checkpoint by its name."""

        @property
        def commit_timestamp(self) -> datetime.datetime:
            """A time that nothing here depends on; Orbax reads it from the marker."""
            return datetime.datetime.fromtimestamp(0, datetime.UTC)

    class Names(steps.NameFormat):
        """Orbax's standard names."""

        def build_name(self, step: int) -> str:
            """The name of a step's folder."""
            return plain.build_name(step)

        def find_all(self, base_path: epath.Path) -> Any:
            """Those of a folder."""
            return [Folder(found.step, found.path) for found in plain.find_all(base_path)]

        def find_step(self, base_path: epath.Path, step: int) -> Any:
            """That of a step."""
            found = plain.find_step(base_path, step)
            return Folder(found.step, found.path)

    class Manager(ocp.CheckpointManager):
        """Has no scores: they are in `scores.json`."""

        def metrics(self, step: int) -> None:
            """None."""

    options = ocp.CheckpointManagerOptions(
        create=not readonly,
        cleanup_tmp_directories=not readonly,
        step_name_format=Names(),
        # Created in a thread, a directory that cannot be made leaves a process that never exits.
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
    )
    return Manager(directory, options=options)
