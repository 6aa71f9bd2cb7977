"""What `pip install` installs is said in one place: the requirements files and the version in the code."""

import configparser
import importlib.util
import pathlib
import sys

import pytest

from src.train.checkpoints import metadata

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def keywords(monkeypatch):
    """The arguments of setup.py's `setup`."""
    setuptools = pytest.importorskip("setuptools")
    seen = {}
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: seen.update(arguments))
    spec = importlib.util.spec_from_file_location("setup_of_the_package", ROOT / "setup.py")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return seen


def test_requirements_are_those_of_the_files(keywords):
    assert "flax>=0.12.6,<0.13" in keywords["install_requires"]
    assert 'array-record>=0.8.1; sys_platform != "win32"' in keywords["install_requires"]  # without its comment
    assert set(keywords["extras_require"]) == {"aot", "eval", "gpu", "peers", "plots", "test", "tpu", "trackers"}
    assert keywords["extras_require"]["peers"] == ["torch>=2.9", "transformers>=5.0"]
    assert keywords["extras_require"]["eval"] == ["lm-eval==0.4.13"]
    everything = [keywords["install_requires"], *keywords["extras_require"].values()]
    assert all(line[0].isalpha() and "#" not in line for lines in everything for line in lines)


def test_version_and_licence():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    about = config["metadata"]
    module, _, name = about["version"].removeprefix("attr: ").rpartition(".")
    assert getattr(sys.modules[module], name) == metadata.VERSION
    released = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert released[0].startswith(f"## [{metadata.VERSION}]")
    assert about["license"] == "Apache-2.0" and "Apache License" in (ROOT / about["license_files"]).read_text()[:100]
    assert config["options.packages.find"]["include"].split() == ["src", "src.*", "configs", "configs.*"]
