"""The compiled step as a file: the same bits when it is loaded, and never one that is stale, damaged or foreign."""

import json
import os
import pickle
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from ml_collections import ConfigDict

from src.build import build_system
from src.common.mesh.distributed import put_batch
from src.common.mesh.fsdp import Placement
from src.common.runtime import background, executables
from src.interfaces import LossTerm
from src.train import saved_step
from src.train.saved_step import CachedStep, SavedStep, own_packages, step_facts, use_saved_step
from src.train.state import TrainState
from src.train.step import StepMetrics
from src.train.trainer import Trainer, make_trainer
from tests.helpers.compiling import ENVIRONMENT
from tests.helpers.numbers import bare
from tests.helpers.one_run import losses
from tests.helpers.runs import config_of

DEVICES = jax.devices()[:2]


def trainer_of(**changes):
    """The debug digits with one task, on two of the devices, which split the parameters."""
    config = config_of(**{"mesh.fsdp": 2, "sharding.min_size": 1, "optim.lr": 1e-2} | changes)
    with config.unlocked():
        del config.tasks["number_sentences"], config.tasks["image_to_caption"]
    return make_trainer(build_system(config), jax.devices()[:2])


def small():
    """A trainer of a step that adds up rows, with a state that two devices share."""
    mesh = jax.make_mesh((2,), ("fsdp",), devices=jax.devices()[:2])
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("fsdp",), ()))
    spec = lambda shape, place: jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)
    state = TrainState(spec((), whole), {"w": spec((4, 2), split)}, {}, (), {"unused": spec((3,), whole)})

    def step(state, batch):
        params = jax.tree.map(lambda w: jnp.tanh(w + batch["x"].sum(0)), state.params)
        terms = {"a": LossTerm(batch["x"].sum(), state.step), "b": LossTerm(state.step, state.step, trained=False)}
        metrics = StepMetrics(terms, {"grad": {"w": params["w"].sum()}}, {"skipped": state.step})
        return state.replace(step=state.step + 1, params=params), metrics

    batch = {"x": spec((6, 2), split)}
    places = (jax.tree.map(lambda leaf: leaf.sharding, state), whole)
    lower = lambda: jax.jit(step, donate_argnums=0, out_shardings=places).lower(state, batch)
    trainer = trainer_with(ConfigDict(), mesh, state)
    trainer.batch, trainer.lower = lambda: batch, lower
    return trainer


def trainer_with(config, mesh=None, state=None):
    """A trainer without a network."""
    mesh = mesh or jax.make_mesh((1,), ("data",))
    state = state or TrainState(jnp.int32(0), {}, {}, (), {})
    return Trainer(bare(config=config), mesh, optax.sgd(0.1), lambda step: 0.1, state, Placement({}, jnp.float32))


@pytest.fixture
def saved(tmp_path, monkeypatch):
    """(trainer, its compiled step, the folder with the step's file)"""
    monkeypatch.setattr(
        saved_step, "step_facts", lambda trainer: {"step": "small"} | executables.machine_facts(DEVICES)
    )
    trainer, folder = small(), tmp_path / "saved"
    compiled = trainer.lower().compile()
    SavedStep(trainer, folder).save(compiled, saved_step.step_facts(trainer))
    return trainer, compiled, folder


def filled(abstract, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jax.device_put(rng.normal(size=s.shape).astype(s.dtype), s.sharding), abstract)


def test_a_loaded_step_is_the_compiled_one(saved, monkeypatch, caplog):
    """It gives the same trees of the same bits, takes the state over, and is not traced."""
    trainer, compiled, folder = saved
    again = small()
    monkeypatch.setattr(again, "lower", lambda: pytest.fail("it was traced"))
    loaded = SavedStep(again, folder).compile()
    results = []
    for step in (compiled, loaded):
        state = filled(trainer.abstract)
        results.append(jax.device_get(step(state, filled(trainer.batch(), 1))))
        assert state.params["w"].is_deleted(), "the state was not donated"
    expected, found = results
    assert jax.tree.structure(expected) == jax.tree.structure(found) and not found[1].terms["b"].trained
    jax.tree.map(np.testing.assert_array_equal, expected, found)
    assert loaded.memory_analysis().argument_size_in_bytes == compiled.memory_analysis().argument_size_in_bytes
    assert "HloModule" in loaded.as_text()  # which a trace asks for
    assert "not used" not in caplog.text


@pytest.mark.faults
@pytest.mark.parametrize("changes", [{}, {"model.dtype": "bfloat16", "model.trunk.remat": "dots"}], ids=str)
def test_a_loaded_train_step_is_the_compiled_one(tmp_path, monkeypatch, changes):
    """Of the digits, on parameters that are split over devices; the doctor can ask for its memory."""
    trainer, again = trainer_of(**changes), trainer_of(**changes)
    compiled = trainer.compile()
    SavedStep(trainer, tmp_path).save(compiled, step_facts(trainer))
    monkeypatch.setattr(again, "lower", lambda: pytest.fail("it was traced"))
    loaded, (task,) = SavedStep(again, tmp_path).compile(), trainer.system.tasks.values()
    batch = put_batch({"caption_to_image": task.task.fake(task.rows, 0)}, trainer.mesh)
    results = []
    for step in (compiled, loaded):
        state = trainer.init()
        with jax.set_mesh(trainer.mesh):
            for _ in range(2):
                state, metrics = step(state, batch)
        results.append(jax.device_get((state, metrics)))
    assert jax.tree.structure(results[0]) == jax.tree.structure(results[1])
    jax.tree.map(np.testing.assert_array_equal, *results)
    assert loaded.memory_analysis().temp_size_in_bytes == compiled.memory_analysis().temp_size_in_bytes


def test_what_is_stale_damaged_or_foreign_is_told_and_compiled(saved, tmp_path, monkeypatch, caplog):
    trainer, compiled, folder = saved
    file, whole = tmp_path / saved_step.FILE, (folder / saved_step.FILE).read_bytes()
    file.parent.mkdir()
    facts = saved_step.step_facts(trainer)
    start = whole.index(b"}", whole.index(b'"sha256"')) + 1

    class Evil:
        def __reduce__(self):
            return (print, ("it ran",))

    def foreign():
        header = json.loads(whole[len(executables.MAGIC) + 4 : start])
        program = pickle.dumps(Evil())
        header["sha256"] = executables.hashlib.sha256(program).hexdigest()
        head = json.dumps(header).encode()
        return executables.MAGIC + len(head).to_bytes(4, "big") + head + program

    monkeypatch.setattr(background, "begin", lambda work, name: work())
    for data, told in (
        (whole[:-1], "its checksum is wrong"),
        (whole[:start] + bytes([whole[start] ^ 1]) + whole[start + 1 :], "its checksum is wrong"),
        (whole[:100], "damaged or no such file"),
        (b"", "damaged or no such file"),
        (whole.replace(b'"facts": {', b'"facts": ['), "not sound JSON"),
        (foreign(), "class builtins.print, which is not allowed"),
    ):
        caplog.clear()
        file.write_bytes(data)
        monkeypatch.setattr(trainer, "lower", lambda: type("Lowered", (), {"compile": lambda self: compiled})())
        assert SavedStep(trainer, tmp_path).compile() is compiled
        (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert told in warning and warning.endswith(": compiling"), warning
        assert executables.read_program(file, facts)[1] == executables.read_program(folder / saved_step.FILE, facts)[1]


def test_a_folder_that_cannot_be_written_stops_nothing(saved, tmp_path, monkeypatch, caplog):
    trainer, compiled, _ = saved
    (tmp_path / "compiled").write_text("a file in its place")
    SavedStep(trainer, tmp_path).save(compiled, {})
    assert "was not written" in caplog.text
    monkeypatch.setattr(trainer, "abstract", {})
    SavedStep(trainer, tmp_path / "other").save(compiled, {})
    assert "unknown structure" in caplog.text and not (tmp_path / "other").exists()


def test_a_step_from_the_cache_of_programs_is_not_written_again(saved, tmp_path, monkeypatch, caplog):
    """XLA's CPU programs that were loaded once lack functions when they are written and loaded a second time."""
    trainer, compiled, _ = saved
    caplog.set_level("INFO", "absl")
    monkeypatch.setattr(background, "begin", lambda work, name: work())

    def compile(self):
        jax.monitoring.record_event(saved_step.HIT)
        return compiled

    monkeypatch.setattr(trainer, "lower", lambda: type("Lowered", (), {"compile": compile})())
    assert SavedStep(trainer, tmp_path).compile() is compiled and not (tmp_path / saved_step.FILE).exists()
    assert "it came from JAX's cache" in caplog.text
    jax.monitoring.record_event(saved_step.HIT)  # of another program
    monkeypatch.setattr(trainer, "lower", lambda: type("Lowered", (), {"compile": lambda self: compiled})())
    SavedStep(trainer, tmp_path).compile()
    assert (tmp_path / saved_step.FILE).exists()


def test_the_cache_keeps_the_newest_steps(saved, tmp_path, monkeypatch):
    trainer, compiled, _ = saved
    monkeypatch.setattr(saved_step, "KEPT", 2)
    for number in range(4):
        monkeypatch.setattr(saved_step, "step_facts", lambda trainer, number=number: {"step": str(number)})
        step = CachedStep(trainer, tmp_path / "steps")
        step.save(compiled, saved_step.step_facts(trainer))
        os.utime(step.path, (number, number))
        assert step.path.exists() and len(list(step.folder.iterdir())) == min(number + 1, 2)
    monkeypatch.setattr(trainer, "lower", lambda: pytest.fail("it was traced"))
    assert CachedStep(trainer, tmp_path / "steps").compile() is not compiled


@pytest.mark.faults
def test_starts_on_one_machine_go_on_from_what_was_compiled(tmp_path):
    """With a step in the cache, with a program alone there, and with a step in the workdir."""
    said, steps = [], tmp_path / "cache/monoformer-jax/xla" / saved_step.FOLDER
    for workdir, choice in (("a", "auto"), ("b", "auto"), ("c", "on"), ("d", "auto")):
        command = [sys.executable, "-m", "src.main", "--config=configs/digits.py:debug", "--config.steps=3"]
        command += [f"--workdir={tmp_path / workdir}", f"--config.compiled_step={choice}"]
        found = os.environ | ENVIRONMENT | {"XDG_CACHE_HOME": str(tmp_path / "cache")}
        done = subprocess.run(command, env=found, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert losses(tmp_path / workdir) == losses(tmp_path / "a")
        said.append(done.stderr)
        if workdir == "c":  # from now on there is the program alone
            shutil.rmtree(steps)
    assert "the compiled step was read from" not in said[0] and f"the compiled step was read from {steps}" in said[1]
    assert "since it came from JAX's cache" in said[2] and not (tmp_path / "c" / saved_step.FILE).exists()
    assert not steps.exists(), "a program that was loaded is not written"


def test_every_fact_that_matters_is_told_apart(monkeypatch):
    """And what does not change the step is no reason to compile."""
    before = step_facts(trainer_of())
    same = step_facts(trainer_of(**{"seed": 7, "log.every": 9, "checkpoint.every": 3, "compiled_step": "off"}))
    assert same == before
    for changes, name in (
        ({"optim.lr": 2e-2}, "config optim"),
        ({"mesh.fsdp": 1, "mesh.data": 2}, "mesh"),
    ):
        found = step_facts(trainer_of(**changes))
        assert name in {key for key in before if found[key] != before[key]}, changes
    devices = jax.devices()
    assert executables.machine_facts(devices[:2])["devices"] != executables.machine_facts(devices[1:3])["devices"]
    flags = executables.machine_facts(devices[:1])
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true --xla_force_host_platform_device_count=3")
    assert (
        executables.machine_facts(devices[:1])["XLA_FLAGS"] == "--xla_cpu_enable_fast_math=true" != flags["XLA_FLAGS"]
    )
    monkeypatch.setattr(executables, "version", lambda package: "0.0")
    assert executables.machine_facts(devices[:1])["jaxlib"] == "0.0" != flags["jaxlib"]


def test_where_a_step_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(saved_step, "step_facts", lambda trainer: {})
    cache = jax.config.jax_compilation_cache_dir
    config = config_of()
    try:
        for choice, workdir, folder, kept in (
            ("auto", tmp_path, None, Trainer),
            ("auto", tmp_path, tmp_path / "xla", CachedStep),
            ("auto", "gs://bucket/run", tmp_path / "xla", SavedStep),
            ("on", tmp_path, tmp_path / "xla", SavedStep),
            ("off", "gs://bucket/run", tmp_path / "xla", Trainer),
            ("off", tmp_path, tmp_path / "xla", Trainer),
        ):
            config.compiled_step = choice
            jax.config.update("jax_compilation_cache_dir", str(folder) if folder else None)
            assert type(use_saved_step(trainer_with(config), workdir).compile.__self__) is kept, choice
    finally:
        jax.config.update("jax_compilation_cache_dir", cache)
    config.compiled_step = "yes"
    with pytest.raises(ValueError, match="compiled_step='yes' is unknown; use one of auto, on, off"):
        use_saved_step(trainer_with(config), tmp_path)
    config.compiled_step, config.fields.image.process.name = "on", "mine.noise:Dots"
    assert own_packages(config) == ["mine.noise:Dots"]
    assert isinstance(use_saved_step(trainer_with(config), tmp_path).compile.__self__, Trainer)
