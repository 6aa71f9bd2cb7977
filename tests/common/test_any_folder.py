"""A config file lies in any folder and runs from any folder."""

import os
import pathlib
import subprocess
import sys

import pytest

OWN = """
from configs.common import base

def get_config(variant=""):
    config = base()
    config.seed = 3
    return config
"""


@pytest.mark.parametrize("folder", ["elsewhere", "work/configs", "work/configs/__init__.py"])
def test_a_config_of_any_folder_runs_from_any_folder(folder, tmp_path):
    root, work = pathlib.Path(__file__).parents[2], tmp_path / "work"
    path = tmp_path / folder.removesuffix("/__init__.py") / "my_config.py"
    for place in (path.parent, work / "src"):  # a folder src of one's own does no harm
        place.mkdir(parents=True)
    if folder.endswith(".py"):
        (tmp_path / folder).touch()  # a package configs of one's own
    path.write_text(OWN)
    for config, told in (
        (str(path), "no workdir is given"),  # what is looked at next, when the config is there
        (os.path.relpath(path, work), "no workdir is given"),
        (f"{path} --config.sead=1", "no such field: sead; did you mean seed"),
        ("configs/digits.py", f"--config={os.path.relpath(root / 'configs/digits.py', work)}"),
    ):
        command = [sys.executable, "-m", "src.main", *f"--config={config}".split()]
        run = subprocess.run(
            command, cwd=work, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True
        )
        assert run.returncode == 1 and told in run.stderr and run.stderr.count("\n") == 1, run.stderr
