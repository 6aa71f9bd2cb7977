"""Files of this machine and files of a store: `gs://`, `s3://` and all that `etils.epath` reads.

In a store a file is written whole or not at all, nothing can be appended to it, it cannot be memory-mapped, and a
folder exists once something lies in it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pathlib
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterable

from absl import logging
from etils import epath

SEND_SECONDS = 60.0  # between two uploads of a file that grows
SEND_SHARE = 0.05  # of the time may go into uploads: a file that takes long to send is sent less often


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Whether the path is an address in a store, such as `gs://bucket/run`."""
    return "://" in os.fspath(path)


def check_store(path: str | os.PathLike[str]) -> None:
    """Raises ValueError, in one sentence, for an address of a kind of store that there is no reader for."""
    kind, sign, _ = os.fspath(path).partition("://")
    try:
        epath.Path(path)
    except KeyError:
        if not sign:
            raise
        advice = "leave out file://" if kind == "file" else "give a folder, or an address such as gs://bucket/run"
        raise ValueError(f"{os.fspath(path)}: addresses {kind}:// cannot be read: {advice}") from None


def identity(path: str | os.PathLike[str]) -> tuple[int, int] | None:
    """Device and number of a local file, or None where there is none: another file of that name has others."""
    try:
        stat = os.stat(path)
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def cache_folder() -> str:
    """Where things are kept that can be made again: $XDG_CACHE_HOME or ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return os.path.join(base, "monoformer-jax")


def write_whole(path: str | os.PathLike[str], data: bytes | Iterable[bytes]) -> None:
    """Writes a file atomically, of bytes or of pieces of them; makes its folder if needed.

    Raises OSError, or what the store's client raises.
    """
    target = epath.Path(path)
    pieces = (data,) if isinstance(data, bytes | bytearray | memoryview) else data
    if is_remote(target):
        target.write_bytes(b"".join(pieces))
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    # The name is unique, because several processes may write the same file at the same time.
    draft = target.parent / f".{target.name}.{uuid.uuid4().hex}.tmp"
    try:
        with draft.open("wb") as file:
            for piece in pieces:
                file.write(piece)
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)


def write_named(path: str | os.PathLike[str], data: bytes, what: str) -> None:
    """`write_whole`; what fails is an OSError, in one sentence, that begins with `what` the file is."""
    try:
        write_whole(path, data)
    except Exception as error:  # a store's client has its own kinds
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise OSError(
            f"{what} {os.fspath(path)!r} cannot be written ({reason}): free room or change the folder"
        ) from error


def move_folder(source: epath.Path, target: epath.Path) -> None:
    """Renames a folder; the one above `target` is made if need be. A store copies every file and is not atomic.

    Raises FileExistsError if `target` exists, OSError, or what the store's client raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_remote(target) and not target.parent.exists():
        (target.parent / "moved.txt").write_text("Folders that were moved out of the way.\n")
    source.rename(target)


def local_copy(path: str | os.PathLike[str]) -> pathlib.Path:
    """The file itself if it is local, else its copy in `cache_folder()`, made once for each size and time of change.

    Processes of one machine wait for the one that copies. Copies of older versions stay until they are removed.
    Raises FileNotFoundError if the file does not exist, OSError if it cannot be copied.
    """
    if not is_remote(path):
        if not os.path.exists(path):
            raise FileNotFoundError(f"there is no file {os.fspath(path)}")
        return pathlib.Path(path)
    source = epath.Path(path)
    folder = pathlib.Path(cache_folder(), "files")
    try:
        stat = source.stat()
        key = hashlib.sha256(f"{source}\0{stat.length}\0{stat.mtime}".encode()).hexdigest()[:16]
        target = folder / key / source.name
        if not target.exists():
            _fetch(source, target, stat.length)
    except FileNotFoundError:
        raise
    except Exception as error:  # a store's client has its own kinds
        reason = " ".join(str(error).split())[:200]
        raise OSError(
            f"{source} cannot be copied to {folder} ({type(error).__name__}: {reason}): "
            "check the address, your rights and the disk, or set XDG_CACHE_HOME to another one"
        ) from error
    return target


def _fetch(source: epath.Path, target: pathlib.Path, size: int) -> None:
    import fcntl  # not on every system

    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.parent / ".lock", "w") as lock:
        locked = False
        with contextlib.suppress(OSError):  # some network disks have no locks: then several copy
            fcntl.flock(lock, fcntl.LOCK_EX)
            locked = True
        if target.exists():
            return
        for rest in target.parent.glob("*.tmp") if locked else ():  # of a process that was killed
            rest.unlink()
        if shutil.disk_usage(target.parent).free < size:
            raise OSError(f"its {size / 1e9:.3g} GB do not fit on the disk")
        logging.info("copying %s (%.3g GB) to %s, once on this machine", source, size / 1e9, target)
        draft, began = target.with_name(f"{target.name}.{uuid.uuid4().hex}.tmp"), time.monotonic()
        try:
            source.copy(draft)
            if draft.stat().st_size != size:
                raise OSError(f"{draft.stat().st_size} of {size} bytes came")
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)
        logging.info("copied %s in %.0f s", source, time.monotonic() - began)


class Mirror:
    """A temporary local folder whose files grow and are sent whole to a folder of a store, now and then.

    One mirror at a time may write a remote file: of two the last one to send wins.
    """

    def __init__(self, remote: str | os.PathLike[str]):
        self.remote = epath.Path(remote)
        self.folder = pathlib.Path(tempfile.mkdtemp(prefix="monoformer-jax-"))
        self._sent: dict[str, int] = {}
        self._next = 0.0

    def fetch(self, name: str) -> None:
        """Brings what the store has of a file, to go on in it. Raises what the store's client raises."""
        with contextlib.suppress(FileNotFoundError):  # `exists` is False, too, when the store does not answer
            (self.remote / name).copy(self.folder / name, overwrite=True)

    def send(self, now: bool = False) -> None:
        """Sends the files that grew, if it is time to or `now`. Raises what the store's client raises."""
        began = time.monotonic()
        if began < self._next and not now:
            return
        try:
            for path in sorted(self.folder.iterdir()):
                size = path.stat().st_size
                if size != self._sent.get(path.name):
                    epath.Path(path).copy(self.remote / path.name, overwrite=True)
                    self._sent[path.name] = size
        finally:  # after a failure too, so that a store that is away does not hold up every line
            ended = time.monotonic()
            self._next = ended + max(SEND_SECONDS, (ended - began) / SEND_SHARE)

    def close(self) -> None:
        """Sends the rest and removes the local folder, which stays if that fails."""
        try:
            self.send(now=True)
        except Exception:
            logging.warning("What could not be sent to %s stays in %s.", self.remote, self.folder)
            raise
        shutil.rmtree(self.folder, ignore_errors=True)
