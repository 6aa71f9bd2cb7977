"""Checks of a run's folder before expensive work starts."""

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
    """The folder, created if needed, after a test file was written there, seen by all processes and removed.

    Raises OSError on all processes.
    """
    # Orbax takes absolute paths only; the address of a bucket is absolute.
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
        reason = agree("" if (folder / first).exists() else "a file of process 0 is not visible to all")
    finally:
        if wrote:
            probe.unlink(missing_ok=True)
    if reason:
        raise OSError(f"the workdir {workdir} is not shared by all processes ({reason}): choose a shared folder")
    return folder


def sweep(folder: epath.Path) -> None:
    """Removes temporary and test files of killed processes from a run's folder; only its trainer may call it.

    A file that cannot be removed causes a warning.
    """
    if jax.process_index() or is_remote(folder):  # stores have no partial files
        return
    for rest in (*folder.glob(".probe-*"), *folder.glob(".*.tmp"), *folder.glob("samples/.*.tmp")):
        try:
            rest.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Could not remove %s: %s", rest, brief(error))
