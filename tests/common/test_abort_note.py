"""A process that JAX aborts says that process 0 is gone, by a process beside it; one that told its end says nothing."""

import contextlib
import os
import signal
import socket
import subprocess
import sys

import pytest

from src.common.runtime import abort_note, peers, stopping

ENDS = {"abort": "os.abort()", "kill": "os.kill(os.getpid(), 9)", "told": "abort_note.close()", "left": "os._exit(1)"}
PROGRAM = """
import os
from src.common.runtime import abort_note
abort_note.ANSWER = 0.3
abort_note.start("{}", 1, 4)
{}
"""


@contextlib.contextmanager
def service(kind):
    """The address of a process 0 that is gone, hangs, or answers."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        if kind != "gone":
            server.listen()
        yield address, server


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("kind", ["gone", "hangs", "answers"])
def test_who_is_aborted_says_that_process_0_is_gone(kind, end):
    with service(kind) as (address, server):
        command = [sys.executable, "-c", PROGRAM.format(address, ENDS[end])]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            if kind == "answers" and end != "told":
                server.settimeout(30)
                server.accept()[0].send(b"settings")
            error = process.stderr.read()  # to the end of both processes
    said = f"error: process 0 of 4, which runs JAX's service at {address}, ended or does not answer, and process 1"
    assert error.startswith(said) and error.count("\n") == 1 if kind != "answers" and end != "told" else error == ""


def test_signals_of_a_terminal_do_not_end_it_and_closing_twice_is_nothing(capfd):
    with service("gone") as (address, _):
        abort_note.start(address, 1, 2)
        watch = abort_note._watch
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(watch.pid, number)
        abort_note.close()
        abort_note.close()
    assert watch.wait(10) in (0, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)  # before it ignores them
    assert "error" not in capfd.readouterr().err


@pytest.mark.parametrize(("index", "launcher", "begun"), [(0, False, 0), (1, False, 1), (1, True, 0)])
def test_only_processes_without_a_launcher_and_service_have_one(monkeypatch, index, launcher, begun):
    class State:
        coordinator_address, process_id, num_processes = "host:1", index, 2

    started = []
    monkeypatch.setattr(peers.jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(peers, "PeerWatch", lambda seconds: None)
    monkeypatch.setattr(peers, "_state", State)
    monkeypatch.setattr(abort_note, "start", lambda *about: started.append(about))
    monkeypatch.delenv(stopping.NOTE, raising=False)
    if launcher:
        monkeypatch.setenv(stopping.NOTE, "note")
    peers.start()
    assert started == [("host:1", 1, 2)][:begun]
