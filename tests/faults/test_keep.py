"""Which checkpoints stay, what counts as best, and that a kill or a full disk on the way costs none of them."""

import json
import subprocess

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from src.train.checkpoints import retention
from src.train.checkpoints.checkpointer import Checkpointer

NAN, INF = float("nan"), float("inf")


def state(step, size=8):
    rng = np.random.default_rng(step)
    return {"bits": jnp.asarray(rng.integers(2**32, size=size, dtype=np.uint32)), "step": jnp.int32(step)}


def on_disk(workdir):
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def abstract(size=8):
    return jax.eval_shape(lambda: state(0, size))


@pytest.mark.parametrize(
    "settings, scores, kept",
    [
        ({}, {}, [7, 8]),
        ({"keep_every": 3}, {}, [3, 6, 7, 8]),
        ({"best": {"metric": "acc"}}, {2: 0.5, 4: 0.9, 6: 0.9, 8: 0.1}, [6, 7, 8]),
        ({"best": {"metric": "acc", "keep": 2}}, {2: 0.5, 4: 0.9, 6: 0.9}, [4, 6, 7, 8]),
        ({"best": {"metric": "acc", "mode": "min"}, "keep": 1}, {1: 0.5, 3: 0.2, 7: 0.4}, [3, 8]),
        ({"best": {"metric": "acc"}}, {2: NAN, 3: 0.3, 4: INF, 5: -INF, 6: NAN}, [3, 7, 8]),
        ({"best": {"metric": "acc", "mode": "min"}}, {2: NAN, 3: 0.3, 4: INF, 5: -INF}, [3, 7, 8]),
        ({"best": {"metric": "acc"}, "keep_every": 4}, {2: NAN, 8: NAN}, [4, 7, 8]),
        ({"best": {"metric": "other"}}, {2: 0.9}, [7, 8]),
    ],
)
def test_what_stays(tmp_path, settings, scores, kept):
    """Fault 11: a metric that is absent, NaN or infinite is never the best."""
    checkpointer = Checkpointer(tmp_path, **({"keep": 2} | settings))
    for step in range(1, 9):
        (tmp_path / "checkpoints" / str(step)).mkdir(parents=True)  # no Orbax: only names count here
        if step in scores:
            checkpointer._scores.write(step, {"acc": scores[step], "loss": 1.0}, range(9))
    assert sorted(checkpointer.retention.kept(range(1, 9), checkpointer._known_scores())) == kept
    json.loads((tmp_path / "scores.json").read_text(), parse_constant=pytest.fail) if scores else None


def test_best_is_kept_found_and_forgotten(tmp_path, caplog):
    best = {"metric": "acc", "mode": "max", "keep": 1}
    checkpointer = Checkpointer(tmp_path, keep=1, every=4, best=best)
    assert [checkpointer.due(s, evaluated=s == 5) for s in (0, 4, 5, 6)] == [False, True, True, False]
    for step, score in ((2, 0.5), (4, 0.8), (6, NAN), (8, 0.1)):
        assert checkpointer.save(step, state(step), {"next": step}, {})
        checkpointer.score(step, {"acc": score} if score != 0.1 else {"loss": 1.0})
    checkpointer.close()
    assert on_disk(tmp_path) == [4, 8]
    assert "acc is nan: step 6 does not count" in caplog.text and "is none of loss: step 8" in caplog.text
    again = Checkpointer(tmp_path, keep=1, best=best, readonly=True)
    assert (again.choose("best"), again.choose("8"), again.choose("latest")) == (4, 8, None)
    found, data, _ = again.restore(abstract(), step=again.choose("best"))
    assert int(found["step"]) == 4 and data == {"next": 4}
    with pytest.raises(FileNotFoundError, match=r"no checkpoint of step 6 in .*; there are 8, 4"):
        again.restore(abstract(), step=6)
    again.close()
    (tmp_path / "scores.json").write_text('{"4": {"acc": ')
    with pytest.raises(ValueError, match=r"--step=best is not known in .*: no checkpoint has a score 'acc'"):
        again.choose("best")
    assert "scores.json cannot be read" in caplog.text
    with pytest.raises(ValueError, match=r"checkpoint.best.metric is not set"):
        Checkpointer(tmp_path, readonly=True).choose("best")
    with pytest.raises(ValueError, match=r"checkpoint.keep_every must be at least 0, not -1"):
        Checkpointer(tmp_path, keep_every=-1)
    with pytest.raises(ValueError, match=r"checkpoint.best.mode='most' is unknown"):
        Checkpointer(tmp_path, best={"mode": "most"})


def test_killed_between_save_and_removal(tmp_path, monkeypatch):
    """Too many checkpoints stay, every one of them whole, and the next save removes them."""
    checkpointer = Checkpointer(tmp_path, keep=1)
    checkpointer.save(1, state(1), {"next": 1}, {})
    with monkeypatch.context() as patch:

        def killed(*_):
            raise KeyboardInterrupt

        checkpointer.wait()
        checkpointer.save(2, state(2), {"next": 2}, {})
        patch.setattr(type(checkpointer.directory), "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpointer.wait()
    assert on_disk(tmp_path) == [2], "a checkpoint that is removed is gone at once"
    assert [p.name for p in (tmp_path / "checkpoints").glob(f"1{retention.LEFTOVER}*")]
    checkpointer = Checkpointer(tmp_path, keep=1)
    assert checkpointer.restore(abstract())[1] == {"next": 2}
    checkpointer.save(3, state(3), {"next": 3}, {})
    checkpointer.close()
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


# --------------------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path):
    """Mounts a file system of so many KiB, where that is allowed."""
    mounted = []

    def mount(kib):
        folder = tmp_path / f"disk-{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "none", str(folder)], capture_output=True, text=True
        )
        if done.returncode:
            pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.faults
def test_disk_full_frees_the_oldest_and_goes_on(small_disk, caplog):
    """Fault 16: three checkpoints were to stay and two fit; one is always sound, and the newest gets written."""
    size = 2**16  # 256 KiB that do not compress
    workdir = small_disk(1000)
    checkpointer, kept = Checkpointer(workdir, keep=3), []
    for step in range(1, 9):
        checkpointer.save(step, state(step, size), {"next": step}, {})
        checkpointer.finish()
        assert on_disk(workdir), "there is always one"
        kept.append(on_disk(workdir))
    print(kept)
    assert "the disk is full" in caplog.text and "training goes on and the next save is tried" in caplog.text
    assert "Removing checkpoint" in caplog.text
    checkpointer.complete(lambda: checkpointer.save(8, state(8, size), {"next": 8}, {}))
    checkpointer.close()
    assert max(on_disk(workdir)) == 8
    assert not list((workdir / "checkpoints").glob("*tmp*")), "what was left is removed"
    found, data, _ = Checkpointer(workdir).restore(abstract(size))
    assert data == {"next": 8}
    jax.tree.map(np.testing.assert_array_equal, found, state(8, size))


@pytest.mark.faults
def test_disk_full_never_takes_the_last_sound_one(small_disk, caplog):
    """Fault 16: only one fits; it stays as it is, the run is told at the end, and goes on when there is room."""
    size = 2**16
    workdir = small_disk(430)
    checkpointer = Checkpointer(workdir, keep=2)
    assert checkpointer.save(1, state(1, size), {"next": 1}, {})
    checkpointer.wait()
    before = {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()}
    for step in (2, 3):
        checkpointer.save(step, state(step, size), {"next": step}, {})
        checkpointer.finish()
    with pytest.raises(OSError, match=r"the last checkpoint was not written: step 4: the disk is full .*; free"):
        checkpointer.complete(lambda: checkpointer.save(4, state(4, size), {"next": 4}, {}))
    assert {p: p.read_bytes() for p in (workdir / "checkpoints").rglob("*") if p.is_file()} == before
    assert "No checkpoint in" in caplog.text and "can be spared" in caplog.text
    subprocess.run(["mount", "-o", "remount,size=2000k", str(workdir)], check=True)
    assert checkpointer.save(5, state(5, size), {"next": 5}, {})
    checkpointer.close()
    assert Checkpointer(workdir).restore(abstract(size))[1] == {"next": 5}
