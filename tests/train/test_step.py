"""The one step: accumulation, devices, exact resume, tensors that learn."""

import contextlib
import gzip
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.build import build_system
from src.common.mesh.sharding import batch_sharding
from src.common.runtime.tracing import Steps, Tracer
from src.common.runtime.writers import JsonLinesWriter, Many
from src.common.tree import flatten
from src.interfaces import LossTerm
from src.train import loop, skip_nonfinite
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.goodput import Goodput, read_attempts
from src.train.metrics import CLOCK, Metrics
from src.train.nonfinite.locate import NonfiniteLocator
from src.train.step import StepMetrics
from src.train.trainer import make_trainer
from tests.helpers.numbers import bare
from tests.helpers.runs import Recorder, close, config_of, logged


def run(folder, devices=1, last=None, traced=None, programs=None, **kwargs):
    """Trains and returns (state, losses by step). `programs` gets the compiled step, or has it."""
    goodput = Goodput(folder / "goodput.jsonl", time.monotonic())
    system = build_system(config_of(**kwargs))
    recorder, log = Recorder(last), JsonLinesWriter(folder / "log.jsonl")
    checkpoints = Checkpointer(str(folder), every=system.config.checkpoint.every)
    trainer = make_trainer(system, jax.devices()[:devices])
    if programs is not None:
        trainer.compile = lambda: programs[0] if programs else programs.append(named(trainer)) or programs[0]
    with contextlib.closing(checkpoints), contextlib.closing(goodput):
        tracer = Tracer(folder, traced)
        state, _ = loop.train(trainer, checkpoints, Many([log, recorder]), 0.0, goodput=goodput, tracer=tracer)
    return jax.device_get(state), recorder.losses


def named(trainer):
    """The compiled step with the names of the code of now, whatever a cache has of before."""
    jax.config.update("jax_compilation_cache_include_metadata_in_key", True)
    try:
        return trainer.lower().compile()
    finally:
        jax.config.update("jax_compilation_cache_include_metadata_in_key", False)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder, programs = tmp_path_factory.mktemp("straight"), []
    return *run(folder, steps=4, programs=programs), logged(folder), programs


def test_a_run_cut_off_after_a_save_ends_as_one_that_was_not_bit_for_bit(straight, tmp_path):
    began = [time.time()]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, steps=4, last=3, **{"checkpoint.every": 2})
    with open(tmp_path / "log.jsonl", "a") as file:
        assert [line["step"] for line in logged(tmp_path)] == [1, 2, 3], "one more than was saved"
        file.write('{"step": 4, "lo')
    began.append(time.time())
    state, losses = run(tmp_path, steps=4, programs=straight[3], **{"checkpoint.every": 2})
    assert sorted(losses) == [3, 4], "the second run must go on, not start again"
    jax.tree.map(np.testing.assert_array_equal, state, straight[0])
    assert logged(tmp_path) == straight[2] and len(straight[2]) == 4
    first, second = read_attempts(tmp_path / "goodput.jsonl")
    passed = [each.last.time - then for each, then in zip((first, second), began, strict=True)]
    assert [first.last.total, second.last.total] == pytest.approx(passed, abs=0.05), "all time is accounted for"
    assert (first.last.step, first.lost_steps, second.last.begun, second.last.step) == (3, 1, 2, 4)
    assert 0 < first.lost < first.last.seconds["steps"] + first.last.seconds["save"] and second.lost == 0
    assert first.seconds["compile"] > 0 and second.seconds["steps"] > 0


@pytest.mark.faults
def test_a_trace_shows_the_scopes_of_the_step_and_changes_no_bit(straight, tmp_path):
    state, _ = run(tmp_path, steps=4, traced=Steps(2, 3), programs=straight[3])
    jax.tree.map(np.testing.assert_array_equal, state, straight[0])
    assert logged(tmp_path) == straight[2]
    (folder,) = (tmp_path / "profile" / "2" / "plugins" / "profile").iterdir()
    (profile,) = folder.glob("*.xplane.pb")
    planes = {plane.name: plane for plane in jax.profiler.ProfileData.from_file(str(profile)).planes}
    assert {"/host:CPU", "/host:metadata"} <= set(planes), "events, and the program with its scopes"
    assert b"block/attention" in profile.read_bytes()
    with gzip.open(folder / "perfetto_trace.json.gz") as file:
        trace = json.load(file)
    assert "metadata" not in trace, "which Perfetto refuses"
    names = [event["name"] for event in trace["traceEvents"] if event.get("ph") == "X"]
    steps = {e["args"]["step_num"] for e in trace["traceEvents"] if e.get("name") == "train"}
    assert steps == {"2", "3"} and names.count("data_wait") == 2
    scopes = {event["args"]["scope"] for event in trace["traceEvents"] if "scope" in event.get("args", {})}
    parts = {part for scope in scopes for part in scope.replace("(", "/").replace(")", "/").split("/")}
    ours = "draw prepare embed trunk block attention feed_forward losses head_text head_image guard optimizer norms"
    assert set(ours.split()) <= parts
    text = (folder / "scopes.txt").read_text()
    assert "trunk/block/attention (backward)" in text and "of 2 steps" in text


def test_means_of_a_log_line_do_not_feel_a_save_between_two_lines():
    system = bare()
    rows = np.random.default_rng(0).normal(size=(7, 2)).astype(np.float32) * 1e3

    def told(cuts):
        meter = Metrics(system, lambda step: 0.0)
        for at, row in enumerate(rows):
            if at in cuts:
                state = json.loads(json.dumps(meter.get_state(at)))
                meter = Metrics(system, lambda step: 0.0)
                meter.set_state(state)
            terms = {"total": LossTerm(row[0], np.float32(1)), "a": LossTerm(row[1], np.abs(row[0]))}
            meter.add(StepMetrics(terms, {}, skip_nonfinite.new_guard()))
        return {k: v for k, v in meter.flush(7).items() if k not in CLOCK}

    assert told(()) == told((3,)) == told((1, 2, 6))
    assert told(())["loss"] == pytest.approx(rows[:, 0].astype(np.float64).mean())
    spoilt = Metrics(system, lambda step: 0.0)
    spoilt.add(StepMetrics({"update_norm": LossTerm(np.float32("nan"), np.float32(1))}, {}, skip_nonfinite.new_guard()))
    with pytest.raises(FloatingPointError, match="an update became infinite between steps 4 and 5"):
        spoilt.get_state(5)


@pytest.mark.faults
def test_accumulation_changes_memory_not_the_result(straight, tmp_path):
    state, losses = run(tmp_path, steps=4, accumulate=2)
    close(losses, straight[1], rtol=2e-4, atol=1e-5)
    close(state.ema, straight[0].ema, rtol=0, atol=2e-4)


def moved(config, steps=3):
    """Largest change of every tensor after some steps of Adam."""
    system = build_system(config)
    trainer = make_trainer(system, jax.devices()[:1])
    state = trainer.init()
    before = jax.device_get(flatten(state.params))
    step = trainer.compile()
    batch = {n: p.task.fake(p.rows, 0) for n, p in system.tasks.items()}
    with jax.set_mesh(trainer.mesh):
        for _ in range(steps):
            state, _ = step(state, jax.device_put(batch, batch_sharding(trainer.mesh)))
    return {path: float(jnp.abs(leaf - before[path]).max()) for path, leaf in flatten(state.params).items()}


CONDITIONINGS = ("TimeToken", "AdaLNPerLayer", "AdaLNBeforeTrunk", "AdditivePerLayer")


@pytest.mark.faults
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_tensor_learns(conditioning):
    config = config_of()
    with config.unlocked():
        config.model.conditioning = {"name": f"conditioning:{conditioning}"}
        config.optim.weight_decay = 0.0
    dead = [path for path, change in moved(config).items() if change == 0]
    assert dead == []


@pytest.mark.faults  # the suite has test_guard.py
def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path, monkeypatch):
    monkeypatch.setattr(NonfiniteLocator, "locate", lambda *_: "a place")  # test_guard.py tests the search
    huge = {"optim.lr": 1e15, "optim.warmup": 0, "checkpoint.every": 1, "guard.patience": 3}
    with pytest.raises(FloatingPointError, match=r"step 4 is the last of 3 skipped steps in a row.*in a place"):
        run(tmp_path, steps=8, **huge)
    newest = Checkpointer(str(tmp_path))
    state, _, _ = newest.restore(make_trainer(build_system(config_of()), jax.devices()[:1]).abstract)
    newest.close()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_refusals():
    with pytest.raises(ValueError, match="do not divide over 8 = devices x accumulate"):
        make_trainer(build_system(config_of(**{"mesh.data": 8, "batch": 16})))
    with pytest.raises(ValueError, match=r"mesh \(data=3, fsdp=1\) does not fit 8 cpu devices"):
        make_trainer(build_system(config_of(**{"mesh.data": 3})))
