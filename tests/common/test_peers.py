"""A process of a run that is gone is told by its number, with what to do; two processes in `tests/faults/`."""

import types

import jax
import pytest

from src.common.runtime import peers

UNHEALTHY = (
    "UNAVAILABLE: The following tasks are unhealthy (stopped sending heartbeats):\n{}\nThe tasks have crashed. Check"
    " the task logs for an earlier error, or scheduler events (e.g. preemption, eviction) to debug further."
)
GLOO = (
    "FAILED_PRECONDITION: Buffer Definition Event: Gloo all-reduce failed: [external/gloo/gloo/transport/tcp/pair.cc:5]"
    " Connection closed by peer [127.0.0.1]:43210"
)


@pytest.fixture
def four(monkeypatch):
    """This process is number 1 of four; `answers` are the numbers that JAX's service has."""
    answers = set()

    class Client:
        def key_value_set(self, key, value, allow_overwrite):
            answers.add(int(key.split("/")[-1]))

        def key_value_dir_get(self, key):
            return [(f"{key}{number}", "1") for number in answers]

    state = types.SimpleNamespace(client=Client(), process_id=1, num_processes=4)
    monkeypatch.setattr(peers, "_state", lambda: state)
    monkeypatch.setattr(peers, "ANSWER", 0.0)
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    return state, answers


def test_who_does_not_meet_the_error_is_missing(four):
    state, answers = four
    answers |= {0}
    assert peers.missing() == [2, 3]
    answers |= {2, 3}
    assert peers.missing() == []
    state.client.key_value_dir_get = lambda key: 1 / 0  # process 0 answers for all
    assert peers.missing() == [0]


def test_the_sentence(four):
    said = peers.told(GLOO, [2, 3])
    assert (
        said.startswith("process 2 and process 3 of 4 ended or does not answer (FAILED_PRECONDITION")
        and "\n" not in said
    )
    assert "start all processes again" in said and len(said) < 400
    assert peers.told("x", []).startswith("another process of 4")


def test_which_errors_mean_that(four, monkeypatch):
    lost = jax.errors.JaxRuntimeError
    assert peers.is_lost(lost(GLOO)) and peers.is_lost(lost(UNHEALTHY.format(1)))
    assert not peers.is_lost(lost("RESOURCE_EXHAUSTED: Out of memory")) and not peers.is_lost(OSError("Broken pipe"))
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: False)
    assert not peers.is_lost(lost(GLOO)), "there is no other"


def test_each_process_tells_who_gives_no_sign(four, monkeypatch):
    """Process 0 looks, process 1 reads what it found; a process that comes back is no longer told."""
    values, told, clock = {}, [], [0.0]
    client = types.SimpleNamespace(
        key_value_set=lambda key, value, allow_overwrite: values.__setitem__(key, value),
        key_value_dir_get=lambda start: [(k, v) for k, v in values.items() if k.startswith(start)],
    )
    monkeypatch.setattr(peers.threading.Thread, "start", lambda self: None)
    monkeypatch.setattr(peers, "time", types.SimpleNamespace(monotonic=lambda: clock[0]))
    watches = []
    for index in range(3):
        state = types.SimpleNamespace(client=client, process_id=index, num_processes=3)
        monkeypatch.setattr(peers, "_state", lambda state=state: state)
        watches.append(peers.PeerWatch(4.0))
    for count in range(10):
        clock[0] += 1.0
        alive = watches[::-1] if count < 3 or count > 7 else watches[1::-1]  # process 2 is away for five seconds
        told.append([watch._look(count) for watch in alive])
        for watch, dead in zip(alive, told[-1], strict=True):
            watch._told = dead
    assert told[6] == [[], []] and told[7] == [[], [2]] and told[8][1:] == [[2], []] and told[9] == [[], [], []]


def test_jax_still_has_what_is_used():
    """It is not public."""
    state = peers._state()
    assert state.process_id == 0 and hasattr(state, "num_processes") and hasattr(state, "client")
    from jax._src.lib import _jax

    for name in ("key_value_set", "key_value_dir_get"):
        assert hasattr(_jax.DistributedRuntimeClient, name)
