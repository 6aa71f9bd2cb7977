"""Checkpoints: exact on any mesh, damage is found and stepped over, and nothing is lost on the way."""

import gc
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct
from ml_collections import ConfigDict

from src.common.mesh.sharding import ShardingRules, make_mesh
from src.train.checkpoints.checkpointer import Checkpointer
from src.train.checkpoints.config_changes import check_config

# Orbax's readers drop their futures when one of them finds damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
CONFIG = ConfigDict({"model": {"width": 8}, "betas": (0.9, 0.95), "steps": 4})


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    extra: dict


def noise(step):
    """Bits that no compressor shortens, so that they are found on disk as they are."""
    return jnp.asarray(np.random.default_rng(step).integers(2**32, size=8192, dtype=np.uint32))


def make_state(step, width=8):
    rng = np.random.default_rng(step)
    kernel = rng.normal(size=(16, width)).astype(np.float32)
    return State(
        step=jnp.int32(step),
        params={"layers": {"kernel": jnp.asarray(kernel)}, "scale": jnp.asarray(kernel[0], jnp.bfloat16)},
        opt_state=(optax.EmptyState(), {"mu": jnp.asarray(kernel**2), "count": jnp.asarray(7 + step, jnp.uint32)}),
        extra={"flags": jnp.asarray(kernel[:, 0] > 0), "bytes": jnp.arange(5, dtype=jnp.int8), "noise": noise(step)},
    )


def abstract(state, mesh=None):
    if mesh is None:
        return jax.eval_shape(lambda: state)
    shardings = ShardingRules(min_size=64).shardings(state, mesh)
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        assert np.array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 2, 4 and 6 of four that were saved on a mesh of 8 data x 1 fsdp."""
    workdir = tmp_path_factory.mktemp("saved")
    mesh = make_mesh({"data": 8, "fsdp": 1})
    checkpointer = Checkpointer(workdir, keep=3, every=2)
    for step in (1, 2, 4, 6):
        state = jax.device_put(make_state(step), ShardingRules().shardings(make_state(step), mesh))
        assert checkpointer.save(step, state, {"next": np.int64(10 * step)}, CONFIG)
        jax.tree.map(lambda x: x.delete(), state)  # as a donation would
    assert not checkpointer.save(6, make_state(6), {}, CONFIG)
    checkpointer.close()
    return workdir


@pytest.fixture(autouse=True, scope="module")
def tidy():
    """Has Python report what Orbax's readers dropped here, where it is ignored."""
    yield
    gc.collect()


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def data_file(workdir, step):
    """The file with the arrays, and a piece of the noise that it holds."""
    piece = np.asarray(noise(step)).tobytes()[64:80]
    files = (workdir / "checkpoints" / str(step) / "state").rglob("d/*")
    return next(path for path in files if piece in path.read_bytes()), piece


def flip_bit(workdir, step):
    path, piece = data_file(workdir, step)
    data = bytearray(path.read_bytes())
    data[data.find(piece)] ^= 1
    path.write_bytes(data)


def test_restores_exactly_on_another_mesh(workdir):
    leftover = workdir / "checkpoints" / "8.orbax-checkpoint-tmp"
    (leftover / "state").mkdir(parents=True)  # what a killed save leaves
    mesh = make_mesh({"data": 2, "fsdp": 4})
    checkpointer = Checkpointer(workdir)
    assert checkpointer.latest_step() == 6
    target = abstract(make_state(6), mesh)
    state, data, meta = checkpointer.restore(target)
    assert_equal(state, make_state(6))
    assert data == {"next": 60} and check_config(meta["config"], CONFIG) == {}
    assert jax.tree.map(lambda x: x.sharding, state) == jax.tree.map(lambda x: x.sharding, target)
    assert "fsdp" in state.params["layers"]["kernel"].sharding.spec
    checkpointer.close()
    assert sorted(p.name for p in workdir.glob("checkpoints/*")) == ["2", "4", "6"]


def test_damage_falls_back_and_the_run_goes_on(workdir, caplog):
    flip_bit(workdir, 6)
    path, _ = data_file(workdir, 4)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    checkpointer = Checkpointer(workdir)
    state, data, _ = checkpointer.restore(abstract(make_state(2)))
    assert_equal(state, make_state(2))
    assert data == {"next": 20}
    assert str(workdir / "checkpoints" / "6") in caplog.text and "the leaf extra/noise has a wrong" in caplog.text
    assert str(workdir / "checkpoints" / "4") in caplog.text
    assert sorted(p.name for p in (workdir / "damaged").iterdir()) == ["4-0", "6-0"]
    assert checkpointer.latest_step() == 2
    assert checkpointer.save(4, make_state(4), {"next": 40}, CONFIG)  # the step's place is free again
    checkpointer.close()
    state, data, _ = Checkpointer(workdir).restore(abstract(make_state(4)))
    assert_equal(state, make_state(4))


def tamper_json(item):
    def tamper(workdir, step):
        path = workdir / "checkpoints" / str(step) / item / "metadata"
        value = json.loads(path.read_text())
        value["value" if item == "data" else "step"] = {"next": 61}
        path.write_text(json.dumps(value))

    return tamper


def test_all_damaged_is_refused_and_nothing_is_touched(workdir):
    tamper_json("data")(workdir, 6)
    tamper_json("meta")(workdir, 4)
    shutil.rmtree(workdir / "checkpoints" / "2" / "state")
    with pytest.raises(RuntimeError, match=r"all 3 checkpoints are damaged.*step 0") as caught:
        Checkpointer(workdir).restore(abstract(make_state(2)))
    assert all(
        f"checkpoints/{step}: {item}" in str(caught.value) for step, item in ((6, "data"), (4, "meta"), (2, "state"))
    )
    assert sorted(p.name for p in workdir.glob("checkpoints/*")) == ["2", "4", "6"]


def test_other_architecture_is_told_in_one_message(workdir):
    other = abstract(make_state(6, width=9))
    other.params["layers"]["bias"] = jax.ShapeDtypeStruct((9,), jnp.float32)
    del other.extra["flags"]
    with pytest.raises(ValueError, match="5 leaves differ") as caught:
        Checkpointer(workdir).restore(other)
    message = str(caught.value)
    assert "params/layers/kernel: float32[16, 8] -> float32[16, 9]" in message and "\n" not in message
    assert "params/layers/bias: absent -> float32[9]" in message and "extra/flags: bool[16] -> absent" in message
    assert sorted(p.name for p in workdir.glob("checkpoints/*")) == ["2", "4", "6"]


def test_nothing_saved_is_none_and_steps_are_due(tmp_path):
    checkpointer = Checkpointer(tmp_path / "new", every=3)
    assert checkpointer.restore({"a": jax.ShapeDtypeStruct((1,), jnp.float32)}) is None
    assert checkpointer.latest_step() is None
    assert [step for step in range(8) if checkpointer.due(step)] == [3, 6]
    checkpointer.close()


def test_a_failed_write_is_reported_and_the_next_one_is_tried(tmp_path, monkeypatch, caplog):
    from orbax.checkpoint import JsonCheckpointHandler

    checkpointer = Checkpointer(tmp_path)
    with monkeypatch.context() as patch:

        async def full(*_, **__):
            raise OSError(28, "No space left on device")

        patch.setattr(JsonCheckpointHandler, "_save_fn", full)  # runs in a background thread
        assert checkpointer.save(1, make_state(1), {}, CONFIG)
        with pytest.raises(OSError, match=r"step 1.*No space left"):
            checkpointer.wait()
    assert "No space left" in caplog.text and checkpointer.latest_step() is None
    assert checkpointer.save(2, make_state(2), {}, CONFIG)
    checkpointer.close()
    assert_equal(Checkpointer(tmp_path).restore(abstract(make_state(2)))[0], make_state(2))


def test_unwritable_workdir_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", "/proc/nowhere"):
        with pytest.raises(OSError, match=f"^the workdir {place} cannot be written .*: choose another --workdir$"):
            Checkpointer(place)
    Checkpointer(tmp_path / "fine")
    assert not list((tmp_path / "fine").iterdir())


def test_config_changes():
    new = ConfigDict({"model": {"width": 16}, "betas": (0.9, 0.95), "steps": 8, "stepsize": 1.0})
    with pytest.raises(ValueError, match=r"model.width: 8 -> 16; stepsize: 'absent' -> 1.0\).*--workdir"):
        check_config(CONFIG, new)
    new.model.width = 8
    assert check_config(CONFIG, new, free=("steps", "stepsize")) == {"steps": (4, 8), "stepsize": ("absent", 1.0)}


def test_damaged_checkpoints_move_inside_a_bucket(bucket):
    checkpoints = Checkpointer("gs://b/run")  # Orbax itself cannot write to a store in memory
    for step in (4, 6):
        bucket.pipe(f"gs://b/run/checkpoints/{step}/state/d/0", b"%d" % step)
        bucket.pipe(f"gs://b/run/checkpoints/{step}/meta/metadata", b"{}")
    checkpoints._move([4])
    bucket.pipe("gs://b/run/checkpoints/4/meta/metadata", b"again")
    checkpoints._move([4])
    files = {path: file.getvalue() for path, file in bucket.store.items() if path.count("/") > 3}
    assert files == {
        "b/run/damaged/4-0/state/d/0": b"4",
        "b/run/damaged/4-0/meta/metadata": b"{}",
        "b/run/damaged/4-1/meta/metadata": b"again",
        "b/run/checkpoints/6/state/d/0": b"6",
        "b/run/checkpoints/6/meta/metadata": b"{}",
    }
