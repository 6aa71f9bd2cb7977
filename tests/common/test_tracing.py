"""Traces of steps: which are asked for, what is told when they cannot be made, and the time of each scope."""

import gzip
import json
import logging
import os
import signal
import time

import jax
import jax.numpy as jnp
import pytest

from src.common.runtime import stopping, trace_files, tracing
from src.common.runtime.tracing import Steps, Tracer, parse_steps
from tests.helpers.one_run import Lines, small_loop


def test_steps_are_told_in_a_flag():
    assert parse_steps("3") == Steps(3, 7) and parse_steps("3:1", 3) == Steps(3, 3) and str(Steps(3, 3)) == "step 3"
    for wrong in ("", "0", "3:0", "-1", "3:", ":3", "a", "3:4:5", "3.5", " 3", "٣", "9" * 5000):
        with pytest.raises(ValueError, match=r"is no STEP or STEP:COUNT, both from 1 on"):
            parse_steps(wrong)
    with pytest.raises(ValueError, match="--profile=9:2 begins after the last step, 8: give a smaller STEP"):
        parse_steps("9:2", 8)


@pytest.fixture
def asked(monkeypatch):
    """`asked()` is a SIGUSR1 that has been heard."""
    stopping.start(graceful=True, shared=False)

    def send():
        heard = stopping._watch.heard
        os.kill(os.getpid(), signal.SIGUSR1)
        while stopping._watch.heard == heard:
            time.sleep(0.001)

    yield send
    stopping.close()


@pytest.fixture
def told(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return lambda: [r.getMessage() for r in caplog.records if "trac" in r.getMessage()]


def traces(folder):
    """The files by the step of the folder."""
    return {path.name: sorted(file.name for file in path.rglob("*") if file.is_file()) for path in folder.iterdir()}


def test_a_signal_traces_the_next_steps_and_a_second_one_is_told(asked, told, monkeypatch, tmp_path):
    monkeypatch.setattr(tracing, "COUNT", 3)
    lines = Lines(lambda step: asked() if step in (2, 4, 8) else None)
    small_loop(monkeypatch, lines, tracer=Tracer(tmp_path, Steps(7, 7)), steps=8)
    found = traces(tmp_path / "profile")
    assert sorted(found) == ["3", "7"], "and that of the flag"
    assert all("perfetto_trace.json.gz" in names and len(names) >= 3 for names in found.values())
    said = told()
    assert [text for text in said if "begins with" not in text and "is in" not in text] == [
        "tracing steps 3 to 5",
        "a trace of steps 3 to 5 is being made: the second request is left out",
        "tracing step 7",
        "no trace is made: there is no step after step 8 in this process",
    ]
    assert lines.steps == [1, 2, 3, 4, 5, 6, 7, 8] and not stopping.asked(), "it is no request to stop"


def test_a_trace_that_cannot_be_written_is_one_warning(told, monkeypatch, tmp_path):
    (tmp_path / "profile").write_text("a file in its place")
    lines = Lines()
    small_loop(monkeypatch, lines, tracer=Tracer(tmp_path, Steps(2, 3)))
    assert lines.steps == [1, 2, 3, 4, 5, 6]
    (said,) = told()
    assert (
        said.startswith(f"the trace of steps 2 to 3 cannot be written to {tmp_path}/profile/2 (") and "goes on" in said
    )


def test_a_folder_that_goes_while_it_traces_is_one_warning_and_the_next_trace_is_made(told, monkeypatch, tmp_path):
    tracer = Tracer(tmp_path, Steps(2, 3))

    def each(step):
        if step == 2:
            os.rename(tmp_path / "profile", tmp_path / "elsewhere")
            (tmp_path / "profile").write_text("a file in its place")
        if step == 4:
            (tmp_path / "profile").unlink()
            tracer.steps = Steps(5, 5)

    small_loop(monkeypatch, Lines(each), tracer=tracer)
    assert any("steps 2 to 3 cannot be written" in text for text in told()), told()
    assert list(traces(tmp_path / "profile")) == ["5"], told()


def test_a_trace_goes_into_a_store(bucket, monkeypatch):
    small_loop(monkeypatch, Lines(), tracer=Tracer("gs://b/run", Steps(6, 9)))
    names = [name for name in bucket.store if name.startswith("b/run/profile/6/plugins/profile/")]
    assert any(name.endswith("perfetto_trace.json.gz") for name in names) and len(names) >= 3


def test_a_run_that_goes_on_behind_the_steps_says_so(told, tmp_path):
    tracer = Tracer(tmp_path, Steps(2, 3))
    assert not tracer.due(3) and not tracer.due(4)
    assert told() == ["no trace is made of steps 2 to 3: the run goes on after step 3"]
    tracer = Tracer(tmp_path, Steps(2, 5))
    assert tracer.due(3), "what is left of them"


def test_time_of_scopes_by_hand(tmp_path):
    """Operations within others, several threads, and those of other programs."""
    text = 'HloModule jit_step, is_scheduled=true\n\nENTRY %main {\n  %a.1 = f32[2] fusion(%p), metadata={op_name="'
    text += 'jit(step)/jvp(trunk)/closed_call/block/attention/mul" stack_frame_id=3}\n  ROOT %w = f32[2] while(%p),'
    text += ' metadata={op_name="jit(step)/transpose(jvp(trunk))/while"}\n  %n = f32[] add(%p)\n}\n'
    events = [
        {"hlo_op": "w", "ts": 0, "dur": 100, "tid": 1},
        {"hlo_op": "a.1", "ts": 10, "dur": 30, "tid": 1},
        {"hlo_op": "a.1", "ts": 50, "dur": 30, "tid": 1},
        {"hlo_op": "a.1", "ts": 0, "dur": 20, "tid": 2},
        {"hlo_op": "n", "ts": 200, "dur": 5, "tid": 2},
        {"hlo_op": "w", "ts": 300, "dur": 7, "tid": 2, "hlo_module": "jit_other"},
    ]
    made = []
    for event in events:
        args = {"hlo_op": event.pop("hlo_op"), "hlo_module": event.pop("hlo_module", "jit_step")}
        made.append({"ph": "X", "pid": 1, "name": "thunk", "args": args} | event)
    folder = tmp_path / "plugins" / "profile" / "now"
    folder.mkdir(parents=True)
    with gzip.open(folder / "vm.trace.json.gz", "wt") as file:
        json.dump({"metadata": {}, "traceEvents": [{"ph": "M", "name": "process_name"}, *made]}, file)
    said = trace_files.complete(tmp_path, 2, lambda: text)
    rows = [line.split(maxsplit=3) for line in (folder / "scopes.txt").read_text().splitlines()[1:]]
    rows[-1][-1:] = ["in all"] * (rows[-1][2:] == ["in", "all"])
    assert [(row[0], row[-1]) for row in rows] == [
        ("0.040", "trunk/block/attention"),
        ("0.020", "trunk (backward)"),
        ("0.006", "other"),
        ("0.066", "in all"),
    ]
    assert said == "trunk/block/attention 61%, trunk (backward) 30%, other 9%"
    assert trace_files.complete(tmp_path, 1, lambda: 1 / 0) == "other 100%", "a backend that shows no program"


def test_operations_on_this_machine_have_the_scopes_of_their_program(tmp_path):
    with jax.named_scope("guard"):
        assert trace_files.scope_of("jit(f)/transpose(jvp(losses))/draw.diffusion/head_x/dot;jit(f)/y") == (
            "losses/head_x (backward)"
        )

    def step(x):
        with jax.named_scope("block"), jax.named_scope("attention"):
            return jnp.sort(x @ x)

    x = jnp.ones((64, 64))
    compiled = jax.jit(step).lower(x).compile()
    tracer = Tracer(tmp_path, Steps(1, 2), compiled.as_text)
    assert tracer.due(0)
    tracer.change(0)
    for _ in range(2):
        jax.block_until_ready(compiled(x))
    assert tracer.due(2)
    tracer.change(2)
    (text,) = (path.read_text() for path in tmp_path.rglob("scopes.txt"))
    assert "block/attention" in text
