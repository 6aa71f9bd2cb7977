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


@pytest.fixture
def nested(folder, tmp_path):
    """Parts that hold parts, on two floors of the package."""
    files = {
        "floor/parent": """
            from typing import ClassVar
            class Parent:
                PARTS: ClassVar[dict[str, str]] = {"schedule": "other", "many": "other/deep"}
                def __init__(self, schedule, many=(), own=None, plain=None, field=None):
                    self.schedule, self.many, self.own, self.plain, self.field = schedule, many, own, plain, field
            class Child(Parent): ...
            """,
        "floor/leaf": "class Leaf:\n    def __init__(self, size=1): self.size = size",
        "other/leaf": """
            class Leaf:
                def __init__(self, size=1):
                    if size < 0:
                        raise ValueError(f"size={size} is below 0")
                    self.size = size + 100
            class Told:
                def __init__(self):
                    raise TypeError("fields.image.codec has no tokens")
            """,
        "other/deep/leaf": "class Leaf:\n    def __init__(self, inner=None): self.inner = inner",
    }
    for name, text in files.items():
        path = tmp_path / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text))
        (path.parent / "__init__.py").touch()
    return folder


@pytest.mark.parametrize("kind", [ConfigDict, dict])
def test_groups_with_a_name_are_built_first(nested, kind):
    config = {
        "name": "parent:Child",
        "schedule": {"name": "leaf:Leaf", "size": 3},
        "many": ({"name": "leaf", "inner": {"name": "leaf"}}, 7, [{"name": "leaf"}]),
        "own": {"name": "leaf"},
        "plain": {"a": 1, "b": {"name": "leaf", "size": 5}},
    }
    parent = lookup.build(nested, kind(config), field="given")
    first, seven, rest = parent.many
    assert parent.schedule.size == 103 and parent.own.size == 1 and parent.field == "given" and seven == 7
    deep = type(first).__module__
    assert deep == "pets.other.deep.leaf" == type(first.inner).__module__ == type(rest[0]).__module__
    assert parent.plain["a"] == 1 and parent.plain["b"].size == 5 and type(parent.plain) is dict
    assert config["schedule"] == {"name": "leaf:Leaf", "size": 3}  # the config is not changed


def test_messages_name_the_path_in_the_config(nested):
    good = {"name": "leaf:Leaf"}
    for change, words in (
        ({"schedule": good | {"sise": 1}},
         r"^fields.image.process.schedule: Leaf \(pets/other/leaf.py\) has no argument 'sise' \(did.* size\?\)"),
        ({"schedule": {"name": "laef"}}, r"^fields.image.process.schedule: there is no pets/other/laef.py \(did you"),
        ({"schedule": {"name": "leaf:Leef"}}, r"^fields.image.process.schedule: .* no public class Leef \(did you"),
        ({"schedule": good | {"size": -1}}, r"^fields.image.process.schedule: size=-1 is below 0$"),
        ({"schedule": {"name": "leaf:Told"}}, r"^fields.image.codec has no tokens$"),
        ({"many": [1, {"name": "leaf", "inner": {"name": "x"}}]},
         r"^fields.image.process.many\[1\].inner: .*/deep/x.py"),
        ({"plain": {"b": {"name": "x"}}}, r"^fields.image.process.plain.b: there is no pets/floor/x.py"),
        ({"shedule": good}, r"^fields.image.process: Parent .* 'shedule' \(did you mean schedule\?\)"),
        ({"field": 1}, r"^fields.image.process: .* gets field from the program"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            config = {"name": "parent:Parent", "schedule": good} | change
            lookup.build(nested, config, where="fields.image.process", field=None)
    with pytest.raises(ValueError, match=r"^fields.text.head: a config for pets/floor needs a 'name'"):
        lookup.build(nested, {"size": 1}, where="fields.text.head")


def test_a_package_of_the_users_own(nested, tmp_path, monkeypatch):
    files = {
        "__init__": "from mine_of_test.parts import Two",
        "parts": "from collections import Counter\nclass One:\n    def __init__(self, leaf, field=None): "
        "self.leaf, self.field = leaf, field\nclass Two: ...",
        "single": "from mine_of_test.parts import Two\nclass Single: ...",
        "needy": "import a_module_that_nobody_has",
        "wrong": "def f(:",
    }
    for name, text in files.items():
        path = tmp_path / "elsewhere" / "mine_of_test" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "elsewhere")
    assert lookup.lookup(nested, "mine_of_test.single").__name__ == "Single"
    assert lookup.lookup(nested, "mine_of_test.single:Two").__module__ == "mine_of_test.parts"
    one = lookup.build(nested, {"name": "mine_of_test.parts:One", "leaf": {"name": "leaf"}}, field=2)
    assert one.leaf.size == 1 and one.field == 2  # without PARTS: the folder that the part itself is looked up in
    parent = lookup.build(nested, {"name": "parent:Parent", "schedule": {"name": "mine_of_test.parts:Two"}})
    assert type(parent.schedule).__name__ == "Two"
    for name, words in {
        "mine_of_test.parts": r"mine_of_test.parts has 2 public classes \(One, Two\); write file:Class$",
        "mine_of_test.parts:Oen": r"mine_of_test.parts has no .* Oen \(did you mean One\?\); it has: One, Two$",
        "mine_of_test.pats:One": r"no module mine_of_test.pats \(did you mean parts\?\); .*needy, parts, single, wrong",
        "yours_of_test.parts": r"no module yours_of_test; a name with a dot is package.module:Class",
        "mine_of_test.needy": r"mine_of_test.needy cannot be imported: .*a_module_that_nobody_has",
        "mine_of_test.wrong": r"mine_of_test.wrong cannot be imported: .*invalid syntax",
    }.items():
        with pytest.raises(ValueError, match=words):
            lookup.lookup(nested, name)
    with pytest.raises(ValueError, match=r"^tasks.a.source: One \(mine_of_test.parts\) has no argument 'fiel'"):
        lookup.build(nested, {"name": "mine_of_test.parts:One", "fiel": 1}, where="tasks.a.source")


def test_a_parser_that_another_thread_disturbs_is_asked_again(monkeypatch):
    parse, failures = ast.parse, [SystemError("AST constructor recursion depth mismatch")] * 2

    def disturbed(*arguments, **options):
        if failures:
            raise failures.pop()
        return parse(*arguments, **options)

    monkeypatch.setattr(ast, "parse", disturbed)
    assert lookup.lookup("common", "runtime/writers:Many") is Many
    assert not failures
