"""The house: imports go down or stay inside a folder, `__init__` files are empty, files and functions stay small."""

import ast
import pathlib

import pytest

SRC = pathlib.Path(__file__).parents[1] / "src"
FLOORS = [
    {"interfaces", "common"},
    {"corruption", "sequence", "codecs"},
    {"models", "data"},
    {"objectives", "sampling"},
    {"train", "evals"},
    {"build", "doctor"},
    {"run", "tools"},
    {"main"},
]
FILES = sorted(SRC.rglob("*.py"))
ROOM = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def room(parts):
    """The room of a module path below src: a folder, or a file that stands for itself."""
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path):
    parts = path.relative_to(SRC).parts
    if path.name == "__init__.py":
        assert path.read_text() == "", f"{path} must be empty"
        return
    here = room(parts)
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        names += [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module == "src":
            names = [f"src.{a.name}" for a in node.names]
        for name in names:
            if name.split(".")[0] != "src":
                continue
            there = name.split(".")[1]
            assert there in ROOM, f"{path}: {name} is on no floor; add it to FLOORS"
            assert there == here or ROOM[there] < ROOM[here], f"{path} ({here}) may not import {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{path}:{node.lineno} {node.name} is too long"
