"""Names stand for files, and what is wrong with one is said in one sentence."""

import ast
import sys
import textwrap

import pytest
from ml_collections import ConfigDict

from src.common import lookup
from src.common.runtime.progress import Progress
from src.common.runtime.writers import Many


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A package `pets` with a file that would fail if it were imported without need."""
    package = tmp_path / "floor"
    package.mkdir()
    files = {
        "cat": """
            from dataclasses import dataclass
            class _Hidden: ...
            @dataclass(frozen=True)
            class Cat:
                paws: int
                name_of: str = "tom"
            """,
        "broken": "raise RuntimeError('imported needlessly')\nclass A: ...\nclass B: ...",
        "empty": "x = 1",
        "module": """
            from flax import nnx
            class Layer(nnx.Module):
                def __init__(self, width, *, rngs):
                    self.width = width
            class Plain: ...
            class Open:
                def __init__(self, **kwargs):
                    self.kwargs = kwargs
            """,
    }
    for name, text in files.items():
        (package / f"{name}.py").write_text(textwrap.dedent(text))
    (package / "__init__.py").write_text("")
    monkeypatch.setattr(lookup, "ROOT", tmp_path)
    monkeypatch.setattr(lookup, "PACKAGE", "pets")
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "pets").symlink_to(tmp_path, target_is_directory=True)
    monkeypatch.syspath_prepend(tmp_path)
    yield "floor"
    for module in [name for name in sys.modules if name.split(".")[0] == "pets"]:
        del sys.modules[module]


def test_real_packages_are_found():
    assert lookup.lookup("common", "runtime/progress") is Progress
    assert lookup.lookup("common", "runtime/writers:Many") is Many


def test_names_resolve_or_say_what_exists(folder):
    assert lookup.lookup(folder, "cat").__name__ == "Cat" and lookup.lookup(folder, "module:Plain").__name__ == "Plain"
    for name, words in {
        "cta": r"no pets/floor/cta.py \(did you mean cat\?\); files there: broken, cat, empty, module$",
        "broken": r"2 public classes \(A, B\); write file:Class$",
        "broken:C": r"no public class C; it has: A, B$",
        "empty": r"0 public classes",
        "cat:_Hidden": r"no public class _Hidden; it has: Cat$",
        "__init__": r"no pets/floor/__init__.py",
        "../floor/cat": r"no pets/floor/../floor/cat.py",
        "": "must be text",
    }.items():
        with pytest.raises(ValueError, match=words):
            lookup.lookup(folder, name)


def test_build_checks_arguments_before_it_constructs(folder):
    cat = lookup.build(folder, ConfigDict({"name": "cat", "paws": 3}), name_of="felix")
    assert (cat.paws, cat.name_of) == (3, "felix")
    assert lookup.build(folder, {"name": "module:Layer", "width": 2}, rngs=None).width == 2
    assert lookup.build(folder, {"name": "module:Plain"}) is not None
    assert lookup.build(folder, {"name": "module:Open", "anything": 1}).kwargs == {"anything": 1}
    for config, extra, words in (
        ({"name": "cat", "pawz": 3}, {},
         r"^Cat \(pets/floor/cat.py\) has no argument 'pawz' \(did you mean paws\?\); .*: paws, name_of$"),
        ({"name": "cat"}, {}, r"^Cat \(pets/floor/cat.py\) needs paws, which"),
        ({"name": "cat", "paws": 1}, {"paws": 2}, r"gets paws from the program"),
        ({"name": "module:Plain", "width": 1}, {}, r"no argument 'width'; it accepts: nothing"),
        ({"name": "module:Layer", "wide": 1}, {"rngs": None}, r"no argument 'wide'.*: width, rngs"),
        ({"paws": 3}, {}, r"needs a 'name'; it has only: paws"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            lookup.build(folder, config, **extra)


def test_a_parser_that_another_thread_disturbs_is_asked_again(monkeypatch):
    parse, failures = ast.parse, [SystemError("AST constructor recursion depth mismatch")] * 2

    def disturbed(*arguments, **options):
        if failures:
            raise failures.pop()
        return parse(*arguments, **options)

    monkeypatch.setattr(ast, "parse", disturbed)
    assert lookup.lookup("data", "digits:CaptionToImage").__name__ == "CaptionToImage"
    assert not failures
