"""A sentence for a process that JAX aborts because process 0 is gone.

JAX's client ends a process by abort() when the connection to the service in process 0 breaks. No code of this process
runs then: a callback cannot be given (jaxlib 0.10.2 calls `missed_heartbeat_callback` with a status that has no type in
Python, std::bad_cast), `jax_enable_recoverability` does not change it, and a thread of ours would race with it. So a
small process beside this one waits for its end, looks whether process 0 can be reached, and says what it means.
"""

from __future__ import annotations

import sys
from typing import Any

ANSWER = 5.0  # seconds that process 0 has to answer
# Standard input ends with this process; a byte on it means that there is nothing to say.
WATCH = """
import os, signal, socket, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_IGN)
if not os.read(0, 1):
    try:
        with socket.create_connection((sys.argv[1], int(sys.argv[2])), float(sys.argv[3])) as service:
            answers = service.recv(1)  # the service speaks first; the system accepts for a process that hangs, too
    except OSError:
        answers = b""
    if not answers:
        os.write(2, sys.argv[4].encode() + b"\\n")
"""

_watch: Any = None


def start(address: str, index: int, count: int) -> None:
    """Begins to watch process `index` of `count`, this one, whose process 0 has its service at `address`, host:port."""
    global _watch
    import subprocess  # when it is needed

    host, _, port = address.rpartition(":")
    told = (
        f"error: process 0 of {count}, which runs JAX's service at {address}, ended or does not answer, and process"
        f" {index} ended with it: the log of process 0 says why; mend that, and start all processes again with the same"
        " command, which goes on from the last checkpoint"
    )
    command = [sys.executable, "-I", "-S", "-c", WATCH, host.strip("[]"), port, str(ANSWER), told]
    _watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)


def close() -> None:
    """This process ends for a reason that it has told, or without one."""
    global _watch
    watch, _watch = _watch, None
    if watch is None:
        return
    import subprocess

    try:
        watch.communicate(b".", timeout=ANSWER)
    except (OSError, subprocess.TimeoutExpired):  # it was killed, or the machine is busy
        return
