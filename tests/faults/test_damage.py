"""Whatever happens to the files of a checkpoint, what is read is what was saved: from it, or from the one before."""

import gc
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.common.mesh.sharding import ShardingRules, make_mesh
from src.train.checkpoints import integrity
from src.train.checkpoints.checkpointer import Checkpointer

# Orbax's readers drop their futures when one of them finds damage.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
STEPS = (2, 4, 6)
CONFIG = {"seed": 0}


def state(step):
    rng = np.random.default_rng(step)
    bits = rng.integers(2**32, size=(256, 64), dtype=np.uint32)  # bits that no compressor shortens
    kernel = rng.normal(size=(8, 8)).astype(np.float32)
    return {"bits": jnp.asarray(bits), "mean": {"kernel": jnp.asarray(kernel)}, "step": jnp.int32(step)}


ABSTRACT = jax.eval_shape(lambda: state(0))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Three checkpoints of one run, written from eight devices."""
    workdir = tmp_path_factory.mktemp("saved")
    checkpointer = Checkpointer(workdir)
    for step in STEPS:
        shardings = ShardingRules(min_size=64).shardings(state(step), make_mesh({"data": 2, "fsdp": 4}))
        assert checkpointer.save(step, jax.device_put(state(step), shardings), {"next": step}, CONFIG)
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


def flip(path, place=0.5):
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(data)


KINDS = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "flipped early": lambda path: flip(path, 0.1),
    "flipped": flip,
    "flipped late": lambda path: flip(path, 0.9),
}
NEEDED = ("meta/metadata", "data/metadata", "state/manifest.ocdbt")


def damage_each(workdir, kinds):
    """Does each of `kinds` to each file of step 6 in turn, reads, and yields (file, kind, step, what was warned)."""
    newest = workdir / "checkpoints" / "6"
    whole = shutil.copytree(newest, workdir.parent / "whole")
    for path in sorted(p for p in newest.rglob("*") if p.is_file() and p.name != integrity.LIST):
        for kind in kinds:
            yield path, kind
            shutil.rmtree(newest, ignore_errors=True)
            shutil.rmtree(workdir / "damaged", ignore_errors=True)
            shutil.copytree(whole, newest)


def check_survival(workdir, caplog, kinds):
    """The pairs (kind, file) after which the checkpoint before was read; after all others the newest was, exactly."""
    fell_back, harmless = set(), set()
    for path, kind in damage_each(workdir, kinds):
        name = str(path.relative_to(workdir / "checkpoints" / "6"))
        KINDS[kind](path)
        caplog.clear()
        checkpointer = Checkpointer(workdir)
        found, data, _ = checkpointer.restore(ABSTRACT)
        checkpointer.close()
        step = data["next"]
        assert step in (6, 4), (name, kind)
        jax.tree.map(np.testing.assert_array_equal, found, state(step))
        assert re.search(rf"[ (]{name} (is|has|cannot)", caplog.text), f"{kind} {name} is not named"
        assert ("trying the one before" in caplog.text) == (step == 4)
        assert sorted(os.listdir(workdir / "checkpoints")) == (["2", "4", "6"] if step == 6 else ["2", "4"])
        assert not (workdir / "damaged").exists() or os.listdir(workdir / "damaged") == ["6-0"]
        (fell_back if step == 4 else harmless).add((kind, name))
    print(len(fell_back), "fell back,", len(harmless), "were read all the same:", sorted(harmless))
    needed = {*NEEDED, *arrays(workdir)} if kinds else set()
    assert fell_back >= {(k, n) for k in kinds if k != "flipped early" for n in needed}
    assert ("missing", "commit_success.txt") in fell_back


def arrays(workdir):
    """The files of step 6 that hold pieces of `bits`."""
    piece = np.asarray(state(6)["bits"]).reshape(2, 128, 4, 16)[0, :, 0]
    folder = workdir / "checkpoints" / "6"
    names = [str(p.relative_to(folder)) for p in folder.rglob("d/*") if piece[3].tobytes() in p.read_bytes()]
    assert names, "the data are not where this test looks for them"
    return names


def test_damage_in_every_file(workdir, caplog):
    check_survival(workdir, caplog, ["missing", "flipped"])


@pytest.mark.faults
def test_every_kind_of_damage_in_every_file(workdir, caplog):
    check_survival(workdir, caplog, KINDS)


@pytest.mark.faults
def test_random_flips_never_give_wrong_numbers(workdir, caplog):
    """300 random bits of any file, some at once: what is read is always exactly one of the checkpoints."""
    rng = np.random.default_rng(0)
    whole = shutil.copytree(workdir, workdir.parent / "whole")
    read = []
    for _ in range(300):
        files = sorted(p for p in (workdir / "checkpoints").rglob("*") if p.is_file() and p.parts[-2] != "2")
        files = [p for p in files if "/2/" not in str(p.relative_to(workdir))]
        for _ in range(rng.integers(1, 4)):
            flip(files[rng.integers(len(files))], rng.random())
        checkpointer = Checkpointer(workdir)
        found, data, _ = checkpointer.restore(ABSTRACT)
        checkpointer.close()
        jax.tree.map(np.testing.assert_array_equal, found, state(data["next"]))
        read.append(data["next"])
        shutil.rmtree(workdir)
        shutil.copytree(whole, workdir)
    print({step: read.count(step) for step in STEPS})
    assert set(read) == set(STEPS)


def remove_item(workdir, step):
    shutil.rmtree(workdir / "checkpoints" / str(step) / "state")


def empty_folder(workdir, step):
    shutil.rmtree(workdir / "checkpoints" / str(step))
    (workdir / "checkpoints" / str(step)).mkdir()


def unmark(workdir, step):
    (workdir / "checkpoints" / str(step) / "_CHECKPOINT_METADATA").unlink()


@pytest.mark.parametrize("damage_it", [remove_item, empty_folder, unmark])
def test_all_but_the_oldest_and_then_all(workdir, caplog, damage_it):
    leftover = workdir / "checkpoints" / "8.orbax-checkpoint-tmp" / "state"
    leftover.mkdir(parents=True)  # of a save that was killed
    (workdir / "checkpoints" / "8.orbax-checkpoint-tmp" / "meta").write_text("{")
    for step in (4, 6):
        damage_it(workdir, step)
    looking = Checkpointer(workdir, readonly=True)
    assert looking.restore(ABSTRACT)[1] == {"next": 2}
    with pytest.raises(RuntimeError, match=r"is damaged .*checkpoints/6: .* is missing.*; there are 4, 2"):
        looking.restore(ABSTRACT, step=6)
    looking.close()
    assert leftover.exists() and not (workdir / "damaged").exists(), "who only looks changes nothing"
    checkpointer = Checkpointer(workdir)
    found, _, _ = checkpointer.restore(ABSTRACT)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, found, state(2))
    assert sorted(os.listdir(workdir / "damaged")) == ["4-0", "6-0"]
    assert os.listdir(workdir / "checkpoints") == ["2"]
    damage_it(workdir, 2)
    before = sorted(workdir.rglob("*"))
    with pytest.raises(RuntimeError, match="all 1 checkpoints are damaged, and the run does not silently start again"):
        Checkpointer(workdir).restore(ABSTRACT)
    assert sorted(workdir.rglob("*")) == before


MARKERS = {
    "a number for handlers": b'{"item_handlers": 0}',
    "a list of handlers": b'{"item_handlers": ["state"], "commit_timestamp_nsecs": 1}',
    "a handler that is no text": b'{"item_handlers": {"state": 3}, "commit_timestamp_nsecs": 1}',
    "text for scores": b'{"metrics": "none", "commit_timestamp_nsecs": 1}',
    "text for a time": b'{"commit_timestamp_nsecs": "now"}',
    "a list of performance": b'{"performance_metrics": [1], "commit_timestamp_nsecs": 1}',
    "a number for the rest": b'{"custom_metadata": 1.5, "commit_timestamp_nsecs": 1}',
    "a list": b"[]",
    "a number": b"3",
    "nothing": b"null",
    "nested": b"[" * 20000 + b"]" * 20000,
    "nested in a field": b'{"item_handlers": ' + b'{"a":' * 20000 + b"1" + b"}" * 20000 + b"}",
    "empty": b"",
    "cut": b'{"item_handlers"',
    "no UTF-8": b'{"item_handlers": "\xff"}',
    "zeros": bytes(100),
    "a folder": None,
    "a pipe": os.mkfifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
}


def spoil(path, how):
    """Puts a thing of `MARKERS` in the place of a file."""
    path.unlink()
    if how is None:
        path.mkdir()
    elif isinstance(how, bytes):
        path.write_bytes(how)
    else:
        how(path)


def quick(names, *chosen):
    """Parameters, those that are not `chosen` in the long group."""
    return [pytest.param(name, marks=[] if name in chosen else [pytest.mark.faults], id=name) for name in names]


@pytest.mark.parametrize("how", quick(MARKERS, "a number for handlers", "nested", "a pipe"))
def test_a_damaged_marker_of_an_older_checkpoint_hides_no_other(workdir, caplog, how):
    spoil(workdir / "checkpoints" / "4" / integrity.MARKER, MARKERS[how])
    looking = Checkpointer(workdir, readonly=True)
    assert looking.all_steps() == [2, 4, 6] and looking.restore(ABSTRACT)[1] == {"next": 6}
    looking.close()
    assert not (workdir / "damaged").exists()
    caplog.clear()
    checkpointer = Checkpointer(workdir)
    found, data, _ = checkpointer.restore(ABSTRACT)
    assert data == {"next": 6}
    jax.tree.map(np.testing.assert_array_equal, found, state(6))
    (told,) = {r.getMessage() for r in caplog.records if "is damaged" in r.getMessage()}
    assert str(workdir / "checkpoints" / "4") in told and integrity.MARKER in told and len(told) < 600
    assert os.listdir(workdir / "damaged") == ["4-0"] and checkpointer.all_steps() == [2, 6]
    assert checkpointer.save(8, state(8), {"next": 8}, CONFIG)
    checkpointer.close()
    assert sorted(os.listdir(workdir / "checkpoints")) == ["2", "6", "8"]


@pytest.mark.parametrize(
    "how",
    quick(["a number for handlers", "nested", "empty", "a folder", "a pipe", "a device"], "a number for handlers"),
)
def test_a_damaged_marker_of_the_newest_gives_the_one_before(workdir, caplog, how):
    spoil(workdir / "checkpoints" / "6" / integrity.MARKER, MARKERS[how])
    checkpointer = Checkpointer(workdir)
    found, _, _ = checkpointer.restore(ABSTRACT)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, found, state(4))
    assert "trying the one before" in caplog.text and os.listdir(workdir / "damaged") == ["6-0"]


def scores(folder):
    (folder / "metrics").mkdir()
    (folder / "metrics" / "metrics").write_text("[[[")


def a_file(folder):
    shutil.rmtree(folder)
    folder.write_text("in the way")


@pytest.mark.faults
@pytest.mark.parametrize("how", [scores, a_file, lambda folder: shutil.rmtree(folder / "data")])
def test_other_things_that_orbax_reads_while_it_lists(workdir, how):
    how(workdir / "checkpoints" / "4")
    (workdir / "checkpoints" / "metadata").write_text("{")  # where Orbax keeps what belongs to all checkpoints
    (workdir / "checkpoints" / "notes.txt").write_text("of a person")
    checkpointer = Checkpointer(workdir)
    assert checkpointer.restore(ABSTRACT)[1] == {"next": 6}
    checkpointer.close()
    assert (workdir / "checkpoints" / "notes.txt").exists()


READ = ("state/_METADATA", "state/manifest.ocdbt", "meta/metadata", "data/metadata", integrity.LIST)


@pytest.mark.parametrize("name", quick(READ, "state/manifest.ocdbt", integrity.LIST))
@pytest.mark.parametrize("how", ["a pipe", "a device"])
def test_no_pipe_and_no_device_is_read(workdir, caplog, name, how):
    spoil(workdir / "checkpoints" / "6" / name, MARKERS[how])
    checkpointer = Checkpointer(workdir)
    found, data, _ = checkpointer.restore(ABSTRACT)
    checkpointer.close()
    jax.tree.map(np.testing.assert_array_equal, found, state(data["next"]))
    assert re.search(rf"{name}'? (is not a plain|cannot be read)", caplog.text), caplog.text
    assert data["next"] == 4 or name == integrity.LIST


def test_a_file_that_is_read_whole_has_a_bound(workdir, caplog):
    os.truncate(workdir / "checkpoints" / "6" / "state" / "_METADATA", 30 << 30)  # it takes no room on the disk
    checkpointer = Checkpointer(workdir)
    assert checkpointer.restore(ABSTRACT)[1] == {"next": 4}
    checkpointer.close()
    assert "state/_METADATA has 32,212,254,720 bytes, which no such file needs" in caplog.text
