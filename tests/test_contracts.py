"""The protocols of `interfaces.py` have what other rooms use of a task and of a layout."""

import ast
import pathlib
from types import SimpleNamespace

import pytest

from src import interfaces
from src.data.sources.records import Records
from src.data.task import SourceTask
from src.sequence.layout import FixedLayout
from src.sequence.packed import PackedLayout
from src.sequence.segment import Segment

SRC = pathlib.Path(__file__).parents[1] / "src"
HOME = {"task": "data", "layout": "sequence"}  # the room that may know more than the protocol


def used(word):
    """Attributes that are read of a variable or attribute of that name, by file, outside of its own room."""
    for path in SRC.rglob("*.py"):
        if HOME[word] in path.relative_to(SRC).parts[:1]:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and word in (
                getattr(node.value, "id", None),
                getattr(node.value, "attr", None),
            ):
                yield path.relative_to(SRC), node.attr


@pytest.mark.parametrize("word, protocol", [("task", interfaces.Task), ("layout", interfaces.Layout)])
def test_other_rooms_use_what_the_protocol_has(word, protocol):
    have = {*dir(protocol), *protocol.__annotations__}
    asked = [(str(path), name) for path, name in used(word) if name not in ("get", "items")]  # groups of a config
    assert len(asked) > 5 and not [(path, name) for path, name in asked if name not in have]


def test_what_there_is_keeps_the_protocol():
    packed = PackedLayout((Segment("text", 4), Segment("image", 2, 0)), 4, (("image", 1),))
    assert isinstance(FixedLayout((Segment("text", 4),)), interfaces.Layout) and isinstance(packed, interfaces.Layout)
    with pytest.raises(ValueError, match="image lies where each packed row says"):
        packed.part("image", "clean")
    without_files = SourceTask.__new__(SourceTask)
    without_files.source, without_files.template = Records("nowhere", moments=True), SimpleNamespace(columns=())
    without_files.layout, without_files.fill, without_files.draws = packed, (), 0
    without_files.conditional = True
    assert isinstance(without_files, interfaces.Task), "a type check opens no files"
    members = {name for name in dir(interfaces.Task) if not name.startswith("_")}
    assert members <= {*dir(SourceTask)}
