"""The folder of a run: whether it can be written, before anything expensive starts."""

from __future__ import annotations

import os
import socket

import jax
from absl import logging
from etils import epath

from src.common.files.store import is_remote
from src.common.mesh.distributed import agree, gather_texts
from src.common.runtime.errors import brief


def check_writable(workdir: str | os.PathLike[str]) -> epath.Path:
    """The folder, made if need be, after a file was written there, seen by every process and removed.

    Raises OSError in one sentence, on every process.
    """
    # Orbax takes absolute paths only; a bucket's address is one.
    folder = epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir))
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    reason = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
    except Exception as error:
        reason = getattr(error, "strerror", None) or brief(error)
    wrote = not reason
    try:
        if reason := agree(reason):
            raise OSError(f"the workdir {workdir} cannot be written ({reason}): choose another --workdir")
        first = gather_texts(probe.name)[0]
        reason = agree("" if (folder / first).exists() else "what process 0 wrote there is not to be seen")
    finally:
        if wrote:
            probe.unlink(missing_ok=True)
    if reason:
        raise OSError(
            f"the workdir {workdir} is not one folder for all processes ({reason}): choose one that they share"
        )
    return folder


def sweep(folder: epath.Path) -> None:
    """Removes the drafts and probes that killed processes left in a run's folder; only its trainer may call it.

    What cannot be removed stays, with a warning.
    """
    if jax.process_index() or is_remote(folder):  # in a store a file is whole or absent
        return
    for rest in (*folder.glob(".probe-*"), *folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")):
        try:
            rest.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Could not remove %s: %s", rest, brief(error))
