"""One run at a time in a workdir: a lock file with its owner, renewed while the run is active.

`<workdir>/lock.json` has host, process and start time. A new run that finds one:

- of a live process on the same machine: ends with an error. Of a dead one, or from before a reboot: takes the lock.
- of another machine (or container): waits. If the lock is renewed, it ends with an error; if not for `LOST` seconds, by
  the file system's clock or by waiting, it takes the lock.

Clocks of machines are never compared. In a store (`gs://`), which cannot create a file only if there is none, two runs
that start within a second or two may both get the lock. The one that lost it notices when it renews it, after at most
`BEAT` seconds, and exits without saving.
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging
from etils import epath

from src.common.files.paths import check_plain
from src.common.files.store import is_remote, write_whole
from src.common.files.strict_json import read_json
from src.common.mesh.distributed import agree
from src.common.runtime import streams
from src.common.runtime.errors import brief
from src.train.checkpoints.workdir import Held

BEAT = 15.0  # seconds between renewals
LOST = 120.0  # seconds without renewal after which a run counts as dead
BYTES = 1 << 16  # of a lock, at most
SETTLE = 2.0  # seconds after which all readers of a store see the last writer


class Lock:
    """Holds `path` from `take` to `release`; calls `lost(message)` when another run has taken it."""

    def __init__(self, path: epath.Path, lost: Callable[[str], None] | None = None):
        self.path, self._lost = path, lost or _leave
        self._me = me() | {"token": uuid.uuid4().hex, "beat": 0, "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._over, self._held = threading.Event(), None
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Takes the lock. Raises RuntimeError when another run has it."""
        while True:
            with _alone(self.path.parent):
                found = self._read()
                if found is None or self._is_dead(found):
                    if found is not None:
                        logging.warning("Taking over %s: %s is gone.", self.path, _who(found))
                    self._write()
                    break
            self._watch(found)
        if is_remote(self.path):
            time.sleep(SETTLE)
        if (now := self._read() or {}).get("token") != self._me["token"]:
            raise RuntimeError(self._refusal(now))
        self._held = Held(self.path.parent)
        self._thread = threading.Thread(target=self._renew, name="lock", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """Removes the file, if this run still has the lock."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(BEAT)
        if self._held:
            self._held.close()
        with contextlib.suppress(Exception):
            if (self._read() or {}).get("token") == self._me["token"]:
                self.path.unlink()

    # ----------------------------------------------------------------------- the lock of another run

    def _is_dead(self, found: dict[str, Any]) -> bool:
        """Whether its run has ended for certain. Raises RuntimeError when it is active for certain."""
        if found.get("host") == self._me["host"]:
            if found.get("boot") != self._me["boot"]:
                return True
            if found.get("space") == self._me["space"]:  # else process numbers cannot be compared
                if _started(found.get("pid")) not in (None, found.get("started")) or not _exists(found.get("pid")):
                    return True
                raise RuntimeError(self._refusal(found))
        return not is_remote(self.path) and self._age() > LOST  # clients of stores may cache the time

    def _age(self) -> float:
        """Seconds since the lock was renewed, by the clock of the file system."""
        probe = self.path.parent / f".probe-{uuid.uuid4().hex}"
        try:
            write_whole(probe, b"now")
            return float(probe.stat().mtime) - float(self.path.stat().mtime)
        except Exception as error:
            logging.warning("The age of %s cannot be read: %s", self.path, brief(error))
            return 0.0
        finally:
            with contextlib.suppress(Exception):
                probe.unlink()

    def _watch(self, found: dict[str, Any]) -> None:
        """Waits `LOST` seconds, then removes the lock. Raises RuntimeError when it is renewed meanwhile."""
        logging.info("%s is held by %s: waiting up to %.0f s for a renewal", self.path, _who(found), LOST)
        end = time.monotonic() + LOST
        while time.monotonic() < end:
            time.sleep(min(BEAT / 4, LOST / 4))
            now = self._read()
            if now is None:
                return
            if now != found:
                raise RuntimeError(self._refusal(now))
        logging.warning("%s was not renewed for %.0f s: %s is gone.", self.path, LOST, _who(found))
        with _alone(self.path.parent):
            if self._read() == found:
                self.path.unlink(missing_ok=True)

    def _refusal(self, found: dict[str, Any]) -> str:
        return (
            f"another run is active in {self.path.parent} ({_who(found)}): wait until it ends or stop it,"
            " or choose another --workdir"
        )

    # ----------------------------------------------------------------------- the file

    def _read(self) -> dict[str, Any] | None:
        """The contents of the file; {} if it is not a valid lock, None if there is no file."""
        check_plain(self.path)
        try:
            found = read_json(self.path, limit=BYTES)
            return found if isinstance(found, dict) else {}
        except FileNotFoundError:
            return None
        except ValueError:
            return {}

    def _write(self) -> None:
        write_whole(self.path, json.dumps(self._me).encode())

    def _renew(self) -> None:
        warned = False
        while not self._over.wait(BEAT):
            try:
                if reason := self._held.lost():
                    self._lost(reason)
                    return
                found = self._read()
                if found and found.get("token") != self._me["token"]:
                    self._lost(f"{_who(found)} has taken over {self.path}, which this run held: this run ends")
                    return
                self._me["beat"] += 1
                self._write()  # also if it was removed
                warned = False
            except Exception as error:
                if not warned:
                    logging.warning("The lock %s cannot be renewed (%s); training goes on.", self.path, brief(error))
                warned = True


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """Context manager with the lock of a workdir, held by process 0 for all; yields the function that releases it.

    Raises RuntimeError on all processes when another run has it.
    """
    lock = Lock(workdir / "lock.json")
    reason = ""
    if jax.process_index() == 0:
        try:
            lock.take()
        except RuntimeError as error:
            reason = str(error)
        except Exception as error:  # the others wait for the reason
            reason = f"the lock {lock.path} cannot be taken ({brief(error)}): check the disk or store of the workdir"
    try:
        if reason := agree(reason):
            raise RuntimeError(reason)
        yield lock.release
    finally:
        if jax.process_index() == 0:
            lock.release()


def me() -> dict[str, Any]:
    """Identity of this process: host, boot id, PID namespace, PID and start time."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _who(found: dict[str, Any]) -> str:
    if not found:
        return "an unknown run"
    return f"host {found.get('host')}, process {found.get('pid')}, since {found.get('since')}"


def _started(pid: Any) -> str | None:
    """Start time of a process of this machine in clock ticks since boot; None if unknown."""
    text = _text(f"/proc/{pid}/stat")
    fields = text.rpartition(")")[2].split() if text else []
    return fields[19] if len(fields) > 19 and fields[0] != "Z" else None


def _exists(pid: Any) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, TypeError, ValueError, OverflowError):
        return False
    except PermissionError:
        return True
    return not os.path.isdir("/proc/self") or _started(pid) is not None  # a zombie has ended


def _text(path: str) -> str | None:
    with contextlib.suppress(OSError, ValueError):  # ValueError: what no path may hold
        return pathlib.Path(path).read_text().strip()
    return None


def _link(path: str) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(path)
    return None


@contextlib.contextmanager
def _alone(folder: epath.Path) -> Iterator[None]:
    """Context manager with an exclusive lock of the folder, if its file system has locks."""
    with contextlib.ExitStack() as stack:
        if not is_remote(folder):
            with contextlib.suppress(ImportError, OSError):  # not on every system or network disk
                import fcntl

                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _leave(text: str) -> None:
    streams.tell(f"error: {text}")
    os._exit(1)  # saving would overwrite the other run's files
