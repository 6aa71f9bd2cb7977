"""A platform's work unit learns where a run is; none, a broken one or a hanging one changes nothing."""

import logging
import threading

import clu.platform
import pytest
from clu.platform import ArtifactType, LocalWorkUnit

from src import run
from src.common.runtime import background, work_unit
from tests.test_main import call


class Unit(LocalWorkUnit):
    """A platform's own unit, which may begin as clu's does."""

    def __init__(self, trouble=lambda: None):
        self.told, self.trouble = [], trouble

    def set_task_status(self, msg):
        self.trouble()
        self.told.append(msg)

    def create_artifact(self, artifact_type, artifact, description):
        self.told.append((artifact_type, artifact, description))


@pytest.fixture
def threads(monkeypatch):
    found = []
    monkeypatch.setattr(background, "_threads", found)
    return found


def test_the_unit_of_a_platform_gets_status_and_workdir(monkeypatch, caplog, threads):
    units = [Unit(), Unit()]
    with caplog.at_level(logging.INFO):
        for first, unit in zip((True, False), units, strict=True):
            monkeypatch.setattr(clu.platform, "_work_unit", unit)
            monkeypatch.setattr(work_unit, "is_first", lambda first=first: first)
            work_unit.announce("gs://b/run", "train")
        for thread in threads:
            thread.join(10)
        assert [u.told[0].partition(" on ")[0] for u in units] == ["train, process 0 of 1"] * 2
        assert units[0].told[1:] == [(ArtifactType.DIRECTORY, "gs://b/run", "workdir")] and not units[1].told[1:]
        monkeypatch.setattr(clu.platform, "_work_unit", LocalWorkUnit())
        work_unit.announce("runs/a", "train")
    assert len(threads) == 2 and not caplog.records


def test_a_unit_that_fails_or_hangs_does_not_stop_a_run(monkeypatch, caplog, threads):
    def fail():
        raise SystemError("no\nplatform")

    over, ended = threading.Event(), []
    for trouble in (fail, lambda: ended.append(over.wait(60))):
        monkeypatch.setattr(clu.platform, "_work_unit", Unit(trouble))
        work_unit.announce("runs/a", "train")
        assert not ended, "the unit was waited for"
    threads[0].join(10)
    over.set()
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert line == "the work unit failed (SystemError: no platform); the run goes on without it"


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_training_and_evaluating_tell_it(tmp_path, capsys, monkeypatch, threads, mode):
    unit = Unit()

    def enough(*_):
        raise ValueError("enough")

    for name in ("sweep", "restore_checkpoint"):
        monkeypatch.setattr(run, name, enough)
    (tmp_path / "checkpoints").mkdir()
    monkeypatch.setattr(clu.platform, "_work_unit", unit)
    flags = ["--config=configs/digits.py:debug", f"--workdir={tmp_path}", f"--mode={mode}"]
    code, error = call(capsys, monkeypatch, *flags)
    assert code == 1 and error.endswith("error: enough")
    threads[-1].join(10)
    assert unit.told[0].startswith(f"{mode}, process 0 of 1 on ")
    assert unit.told[1] == (ArtifactType.DIRECTORY, str(tmp_path), "workdir")
