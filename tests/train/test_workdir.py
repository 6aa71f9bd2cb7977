"""Any name of a workdir keeps its checkpoints, or is refused before anything starts."""

import os

import jax.numpy as jnp
import pytest

from src.common.runtime.writers import JsonLinesWriter, TensorBoard
from src.evals.given import example_of
from src.tools.datasets.sources import of_source
from src.train.checkpoints.checkpointer import Checkpointer

STATE = {"a": jnp.arange(3.0)}


@pytest.mark.parametrize(
    "name", ["sp ace", "new\nline", "per%20cent%", "a/../b", "ü-ñ-犬", "a:b", "{x}$HOME", "k" * 255, "tab\t'\"", "./~"]
)
def test_a_name_that_is_unusual_keeps_everything(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpointer(name)
    checkpoints.save(1, STATE, {}, {})
    checkpoints.wait()
    found, _, _ = Checkpointer(name, readonly=True).restore(STATE)
    assert found["a"].tolist() == [0, 1, 2]
    for writer in (JsonLinesWriter(f"{name}/log.jsonl"), TensorBoard(f"{name}/tensorboard")):
        writer.write_scalars(1, {"x": 1})
        writer.close()
        assert not writer.lost
    assert sorted(os.listdir(name)) == ["checkpoints", "log.jsonl", "tensorboard"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (os.fsdecode(b"m\xfcller"), "the name is not UTF-8"),
        (os.fsdecode(b"m\xfcller/below"), "the name is not UTF-8"),
        ("run[1]", r"the path has the character \["),
        ("run*", r"the path has the character \*"),  # the files of run1 would be taken for its own
        ("run?", r"the path has the character \?"),
        ("a\\b", r"the path has the character \\"),
        ("/".join(["d" * 200] * 20), "the path has more than 3,900 bytes"),
        ("/".join(["é" * 100] * 20), "the path has more than 3,900 bytes"),
        ("l" * 256, "File name too long"),
        ("file", "File exists"),
        ("file/below", "Not a directory"),
    ],
)
def test_a_name_that_could_not_be_read_again_is_refused(name, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"^the workdir .*{reason}.*: choose another --workdir$") as told:
        Checkpointer(name)
    assert str(told.value).isprintable() and len(str(told.value)) < 500
    assert os.listdir(tmp_path) == ["file"]


def test_a_folder_whose_own_name_is_not_utf8_is_refused_for_a_relative_workdir(tmp_path, monkeypatch):
    here = os.fsencode(tmp_path) + b"/m\xfcller"
    os.mkdir(here)
    monkeypatch.chdir(os.fsdecode(here))
    with pytest.raises(OSError, match="the name is not UTF-8"):
        Checkpointer("run")


def test_a_tilde_is_a_home_folder_for_tools_and_given_images_too(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    _, source = of_source("image_folders", ["folder=~/train", "names=~/names.json", "held_out=3"])
    assert (source.folder, source.names, source.held_out) == (f"{tmp_path}/train", f"{tmp_path}/names.json", 3)
    with pytest.raises(ValueError, match="no user 'no-one'"):
        of_source("image_folders", ["folder=~no-one/train"])
    (tmp_path / "a.png").write_bytes(b"x")
    task = type("Task", (), {"template": None, "source": None})()
    assert os.fspath(example_of(task, {}, {"image": "~/a.png"})["image"]) == f"{tmp_path}/a.png"
