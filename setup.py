"""The extras of setup.cfg's package: `pip install -e .[test]` installs what requirements-test.txt lists."""

import pathlib

from setuptools import setup

ROOT = pathlib.Path(__file__).parent


def requirements(file: pathlib.Path) -> list[str]:
    """The lines of a requirements file, without comments and without those that name another file."""
    lines = [line.partition(" #")[0].strip() for line in file.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line and not line.startswith(("#", "-"))]


setup(
    install_requires=requirements(ROOT / "requirements.txt"),
    extras_require={
        file.stem.removeprefix("requirements-"): requirements(file) for file in ROOT.glob("requirements-*.txt")
    },
)
