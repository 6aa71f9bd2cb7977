"""The house: imports go down or stay inside a folder, `__init__` files are empty, files and functions stay small."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SRC = ROOT / "src"
FLOORS = [
    {"structs"},
    {"interfaces", "common"},
    {"corruption", "sequence", "codecs"},
    {"objectives", "sampling", "data", "models"},
    {"train", "evals"},
    {"build", "doctor"},
    {"run", "tools"},
    {"main"},
]
INSIDE = {  # rooms of a folder, from the ground up; those of one floor do not know each other, others are free
    "common": [{"tree", "rng", "lookup"}, {"files", "mesh"}, {"runtime"}],
    "models": [{"layers"}, {"backends", "embedders", "heads"}, {"transformer"}, {"model"}, {"build"}],
    "data": [{"example"}, {"files"}, {"images"}, {"pipeline"}, {"sources", "templates"}, {"task"}, {"prepare"}],
    "objectives": [{"losses"}, {"diffusion", "distill", "next_token"}],
    "sampling": [{"guidance", "steps"}, {"walk"}, {"decoders"}, {"pipeline"}],
    "train": [
        {"checkpoints", "optim", "trainable"}, {"state"}, {"system"}, {"step"}, {"trainer"}, {"nonfinite"}, {"loop"},
    ],
    "tools": [
        {"compile", "conversion", "datasets", "reports"},
        {"benchmarks", "language"},
        {
            "aot", "bench", "bench_data", "convert", "goodput", "latents", "lm_eval", "perplexity", "prepare",
            "report", "reproduce", "show_batch", "sweep",
        },
    ],
}  # fmt: skip
FILES = sorted(SRC.rglob("*.py"))
NAMES = {".".join(path.relative_to(ROOT).with_suffix("").parts) for path in FILES}


def imported(path, inside_functions=True):
    """The modules of src that a file imports."""
    found = set()
    waiting = [ast.parse(path.read_text())]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda) and not inside_functions:
            continue
        waiting += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            deeper = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (deeper & NAMES) or {node.module}
    return {name for name in found if name.split(".")[0] == "src"}


def level(floors, room):
    """The number of a room's floor, None for a room that has none."""
    return next((number for number, rooms in enumerate(floors) if room in rooms), None)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_go_down(path):
    if path.name == "__init__.py":
        assert path.read_text() == "", f"{path} must be empty"
        return
    here = path.relative_to(SRC).parts[0].removesuffix(".py")
    for name in imported(path):
        there = name.split(".")[1]
        assert level(FLOORS, there) is not None, f"{path}: {name} is on no floor; add it to FLOORS"
        assert there == here or level(FLOORS, there) < level(FLOORS, here), f"{path} ({here}) may not import {name}"


@pytest.mark.parametrize("folder", INSIDE)
def test_imports_inside_a_folder_go_down(folder):
    for path in (SRC / folder).rglob("*.py"):
        here = path.relative_to(SRC / folder).parts[0].removesuffix(".py")
        for name in imported(path, inside_functions=False):
            _, top, *below = name.split(".")
            there = below[0] if below else ""
            floors = level(INSIDE[folder], here), level(INSIDE[folder], there)
            if top == folder and there != here and None not in floors:
                assert floors[1] < floors[0], f"{path.relative_to(SRC)} may not import {name}"


def circle(arrows):
    """Some nodes that lead back to the first of them, or nothing."""
    done = set()

    def walk(node, way):
        if node in way:
            return way[way.index(node) :]
        if node not in done:
            done.add(node)
            for following in sorted(arrows.get(node, ())):
                found = walk(following, [*way, node])
                if found:
                    return found
        return []

    return next(filter(None, (walk(node, []) for node in sorted(arrows))), [])


def test_no_circles():
    modules, rooms = {}, {}
    for path in FILES:
        parts = path.relative_to(ROOT).with_suffix("").parts
        for name in imported(path, inside_functions=False):
            modules.setdefault(".".join(parts), set()).add(name)
            there = name.split(".")
            if parts[:2] == tuple(there[:2]) and parts[2:3] != tuple(there[2:3]):
                rooms.setdefault("/".join(parts[1:3]), set()).add("/".join(there[1:3]))
    assert not circle({"a": {"b"}, "b": {"c"}, "c": set()}) and circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [
        "b",
        "c",
    ]
    assert not circle(modules), "modules import each other"
    assert not circle(rooms), "rooms of a folder import each other"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SRC)))
def test_files_and_functions_stay_small(path):
    text = path.read_text()
    assert text.count("\n") <= 350, f"{path} has {text.count(chr(10))} lines"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno <= 60, f"{path}:{node.lineno} {node.name} is too long"
