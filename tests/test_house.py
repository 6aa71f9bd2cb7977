"""What keeps the middle floors free of modalities, and names clear: read from the source, nothing runs."""

import ast
import collections
import pathlib
import re

SRC = pathlib.Path(__file__).parents[1] / "src"
MIDDLE = ("interfaces.py", "sequence", "models", "objectives", "sampling", "train")
APART = ("models/pretrained", "train/checkpoints/migrations")  # others' files, and our own of before
FIELDS = ("text", "image", "vision")


def sources(*places):
    """(path below src, syntax tree) of the files of some places."""
    for place in places:
        for path in [SRC / place] if place.endswith(".py") else sorted((SRC / place).rglob("*.py")):
            yield str(path.relative_to(SRC)), ast.parse(path.read_text())


def plain_strings(tree):
    """(line, text) of the string constants that are no docstrings."""
    documentation = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            documentation.add(node.value)
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in documentation:
            yield node.lineno, node.value


def test_middle_floors_name_no_field():
    word = re.compile(rf"({'|'.join(FIELDS)})([._/:][\w./:]*)?")
    found = [
        f"{path}:{line} {text!r}"
        for path, tree in sources(*MIDDLE)
        if not path.startswith(APART)
        for line, text in plain_strings(tree)
        if word.fullmatch(text)
    ]
    assert not found, "\n".join(found)


def test_only_the_sequence_asks_for_the_kind_of_a_layout_or_field():
    kinds = re.compile(r"\b(\w*Layout|\w*Field|Document)\b")
    found = [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, tree in sources(".")
        if not path.startswith("sequence/")
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance"
        if kinds.search(ast.unparse(node.args[1]))
    ]
    assert not found, "\n".join(found)


def test_build_has_no_special_cases():
    text = (SRC / "build.py").read_text()
    assert text.count("\n") <= 120
    names = {node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
    assert not names & {"hasattr", "isinstance", "inspect"}


def test_a_public_class_has_a_name_of_its_own():
    places = collections.defaultdict(list)
    for path, tree in sources("."):
        if "/peers/" in path or "/_" in path:
            continue
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                places[node.name].append(path)
    twice = {name: paths for name, paths in places.items() if len(paths) > 1}
    assert not twice, "\n".join(f"{name}: {', '.join(paths)}" for name, paths in twice.items())


def test_these_rules_find_what_they_look_for():
    tree = ast.parse('"""text"""\ndef f():\n    "image"\n    return {"text": 1}["vision.x"] + f"{1}text"')
    assert sorted(text for _, text in plain_strings(tree)) == ["text", "text", "vision.x"]
