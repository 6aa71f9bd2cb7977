"""The platform that a run is part of, through `clu.platform`: which process runs on which machine, and the workdir.

clu has one work unit for a process, `clu.platform.work_unit()`, and a site that has a platform puts its own there. The
one that clu brings only writes to the log what the log has already, so that it is not asked.
"""

from __future__ import annotations

import os
import platform as machine

import jax
from absl import logging

from src.common.mesh.distributed import is_first
from src.common.runtime import background


def announce(workdir: str | os.PathLike[str], mode: str) -> None:
    """Tells a platform's work unit the status of this process, and, once for a run, that its files are in `workdir`.

    In a thread of its own: a platform that hangs or fails neither delays nor stops a run. A failure is a warning.
    """
    from clu import platform

    unit = platform.work_unit()
    if type(unit) is platform.LocalWorkUnit:
        return
    first = is_first()  # asked here: JAX may be closed before the thread comes to it
    status = f"{mode}, process {jax.process_index()} of {jax.process_count()} on {machine.node()}"

    def tell() -> None:
        try:
            unit.set_task_status(status)
            if first:
                unit.create_artifact(platform.ArtifactType.DIRECTORY, os.fspath(workdir), "workdir")
        except Exception as error:  # of somebody else's code
            told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            logging.warning("the work unit failed (%s); the run goes on without it", told)

    background.begin(tell, "work unit")
