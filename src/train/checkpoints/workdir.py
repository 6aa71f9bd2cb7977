"""Checks of a run's folder before expensive work starts."""

from __future__ import annotations

import contextlib
import os
import socket

import jax
from absl import logging
from etils import epath

from src.common.files.paths import shown
from src.common.files.store import is_remote
from src.common.mesh.distributed import agree, gather_texts
from src.common.runtime import errors
from src.common.runtime.errors import brief

LONGEST = 3900  # bytes of a workdir's path; checkpoints add up to 150, and systems take 4096
PATTERNS = "*?[\\"  # with one of these in its path the library of checkpoints reads or writes other folders


def check_name(folder: epath.Path) -> None:
    """Raises OSError, in one sentence, for the path of a local folder whose checkpoints could not be read again."""
    text, reason = os.fspath(folder), ""
    try:
        if len(text.encode()) > LONGEST:
            reason = f"the path has more than {LONGEST:,} bytes"
    except UnicodeEncodeError:
        reason = "the name is not UTF-8"
    if found := [c for c in PATTERNS if c in text]:
        reason = f"the path has the character {found[0]}"
    if reason:
        raise OSError(f"the workdir {shown(text)} cannot keep checkpoints ({reason}): choose another --workdir")


def check_writable(workdir: str | os.PathLike[str]) -> epath.Path:
    """The folder, created if needed, after a test file was written there, seen by all processes and removed.

    Raises OSError on all processes.
    """
    # Orbax takes absolute paths only; the address of a bucket is absolute.
    folder = epath.Path(workdir if "://" in str(workdir) else os.path.abspath(workdir))
    if not is_remote(folder):
        check_name(folder)
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    reason = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_text("probe")
    except Exception as error:
        reason = errors.explain(error)
    wrote = not reason
    try:
        if reason := agree(reason):
            here = not any(f"{cause.called} (" in reason for cause in errors.LIMITS)  # what another place would mend
            advice = "choose another --workdir" if here else errors.way_out(reason, workdir)
            told = str(workdir) if str(workdir).isprintable() and len(str(workdir)) < 200 else shown(workdir)
            raise OSError(f"the workdir {told} cannot be written ({reason}): {advice}")
        first = gather_texts(probe.name)[0]
        reason = agree("" if (folder / first).exists() else "a file of process 0 is not visible to all")
    finally:
        if wrote:
            probe.unlink(missing_ok=True)
    if reason:
        raise OSError(f"the workdir {workdir} is not shared by all processes ({reason}): choose a shared folder")
    return folder


def unwritable(folder: epath.Path) -> str:
    """Why nothing can be written into a folder of this machine, or "" where it can or is still to be made."""
    if is_remote(folder) or not folder.exists():
        return ""
    return "" if folder.is_dir() and os.access(folder, os.W_OK | os.X_OK) else "it is not a writable folder"


class Held:
    """A folder of this machine that is kept open, so that its removal is noticed; nothing of a store."""

    def __init__(self, folder: epath.Path):
        self.folder, self._handle = folder, None
        if not is_remote(folder):
            with contextlib.suppress(OSError):  # not every system opens folders
                self._handle = os.open(folder, os.O_RDONLY)

    def lost(self) -> str:
        """Why what is written now would not be with what was written before, in one sentence, or ""."""
        if self._handle is None:
            return ""
        try:
            same = os.path.samestat(os.fstat(self._handle), os.stat(self.folder))
        except FileNotFoundError:
            same = False
        except OSError:  # a network disk that does not answer now
            return ""
        if same:
            return ""
        return (
            f"the workdir {self.folder} was removed, moved or replaced while the run was at work, and what it wrote"
            " before is not there: put it back, or empty the folder, and start the same command again"
        )

    def close(self) -> None:
        """Stops looking."""
        handle, self._handle = self._handle, None
        if handle is not None:
            os.close(handle)


def sweep(folder: epath.Path) -> None:
    """Removes temporary and test files of killed processes from a run's folder; only its trainer may call it.

    A file that cannot be removed causes a warning.
    """
    if jax.process_index() or is_remote(folder):  # stores have no partial files
        return
    drafts = (".probe-*", ".*.tmp", "samples/.*.tmp", "compiled/.*.tmp")
    for rest in (path for pattern in drafts for path in folder.glob(pattern)):
        try:
            rest.unlink(missing_ok=True)
        except OSError as error:
            logging.warning("Could not remove %s: %s", rest, brief(error))
