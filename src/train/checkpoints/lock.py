"""One run at a time in a workdir: a lock file with its owner, renewed while the run is active.

`<workdir>/lock.json` has host, process and start time. A run that finds one acts by these rules:

- the same machine and the process is alive: refused. It is gone, or the machine was restarted: taken over.
- another machine (or another container): it is watched. When it is renewed, refused; when it was not renewed for
  `LOST` seconds, by the file store's own clock or by watching, taken over.

Clocks of machines are never compared. What is not promised: in a store (`gs://`), which cannot create a file only
where there is none, two runs that start within a second or two may both get the lock. The one that lost it finds that
out when it renews it, after at most `BEAT` seconds, and ends at once without saving.
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

BEAT = 15.0  # seconds between two signs of life
LOST = 120.0  # seconds without one, after which a run counts as dead
BYTES = 1 << 16  # of a lock, at most
SETTLE = 2.0  # seconds after which a store's last writer is known


class Lock:
    """Holds `path` from `take` to `release`. `lost` is called with a sentence when another run has taken it."""

    def __init__(self, path: epath.Path, lost: Callable[[str], None] | None = None):
        self.path, self._lost = path, lost or _leave
        self._me = me() | {"token": uuid.uuid4().hex, "beat": 0, "since": time.strftime("%Y-%m-%d %H:%M:%S %z")}
        self._over, self._held = threading.Event(), None
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Raises RuntimeError in one sentence when another run has it."""
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
        """Removes the file, if it is still this run's."""
        self._over.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(BEAT)
        if self._held:
            self._held.close()
        with contextlib.suppress(Exception):
            if (self._read() or {}).get("token") == self._me["token"]:
                self.path.unlink()

    # ----------------------------------------------------------------------- judging another's lock

    def _is_dead(self, found: dict[str, Any]) -> bool:
        """Whether its run has certainly ended. Raises RuntimeError when it is certainly active."""
        if found.get("host") == self._me["host"]:
            if found.get("boot") != self._me["boot"]:
                return True
            if found.get("space") == self._me["space"]:  # else it has other process numbers
                if _started(found.get("pid")) not in (None, found.get("started")) or not _exists(found.get("pid")):
                    return True
                raise RuntimeError(self._refusal(found))
        return not is_remote(self.path) and self._age() > LOST  # a store's client may cache an older time

    def _age(self) -> float:
        """Seconds since the lock was renewed, by the clock of the file system."""
        probe = self.path.parent / f".probe-{uuid.uuid4().hex}"
        try:
            write_whole(probe, b"now")
            return float(probe.stat().mtime) - float(self.path.stat().mtime)
        except Exception as error:
            logging.warning("The age of %s is not to be had: %s", self.path, brief(error))
            return 0.0
        finally:
            with contextlib.suppress(Exception):
                probe.unlink()

    def _watch(self, found: dict[str, Any]) -> None:
        """Until it is not renewed for `LOST` seconds, when it is removed. Raises RuntimeError when it is renewed."""
        logging.info("%s is held by %s: watching for at most %.0f s whether it lives", self.path, _who(found), LOST)
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
            f"another run is at work in {self.path.parent} ({_who(found)}): wait until it ends or stop it,"
            " or choose another --workdir"
        )

    # ----------------------------------------------------------------------- the file

    def _read(self) -> dict[str, Any] | None:
        """The contents of the file; {} when it is no readable lock, None when there is no file."""
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
                    self._lost(f"{_who(found)} has taken over {self.path}, which this run held: leaving it alone")
                    return
                self._me["beat"] += 1
                self._write()  # also where it was removed
                warned = False
            except Exception as error:
                if not warned:
                    logging.warning("The lock %s cannot be renewed (%s); training goes on.", self.path, brief(error))
                warned = True


@contextlib.contextmanager
def hold(workdir: epath.Path) -> Iterator[Callable[[], None]]:
    """The lock of a workdir for a block, held by process 0 for all; gives the function that releases it.

    Raises RuntimeError, on every process, when another run has it.
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
    """This process: host, boot of the machine, space of process numbers, number and start."""
    return {
        "host": socket.gethostname(),
        "boot": _text("/proc/sys/kernel/random/boot_id"),
        "space": _link("/proc/self/ns/pid"),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
    }


def _who(found: dict[str, Any]) -> str:
    if not found:
        return "a run that left no name"
    return f"host {found.get('host')}, process {found.get('pid')}, since {found.get('since')}"


def _started(pid: Any) -> str | None:
    """When a process of this machine was started (clock ticks since the boot), or None where that is unknown."""
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
    return not os.path.isdir("/proc/self") or _started(pid) is not None  # a zombie is gone


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
    """While no other process of this file system is in here, where it can lock at all."""
    with contextlib.ExitStack() as stack:
        if not is_remote(folder):
            with contextlib.suppress(ImportError, OSError):  # no such thing on this system or network disk
                import fcntl

                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _leave(text: str) -> None:
    streams.tell(f"error: {text}")
    os._exit(1)  # saving would spoil what the other run writes
