"""Name = file: `"blackout"` on the corruption floor is the public class of `src/corruption/blackout.py`.

A name is one of

    file                  the one public class of that file of the part's folder
    file:Class            that class of it
    folder/file:Class     of a folder below the part's folder
    package.module:Class  of another package that Python can import; without `:Class` its one public class
"""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
import numbers
import os
import pkgutil
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

PACKAGE = __name__.split(".")[0]
ROOT = Path(__file__).resolve().parents[1]
TRIES = 4
# Annotations of arguments that are checked: what a value may be, and the words for it
KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "int": ((numbers.Integral,), "a whole number"),
    "float": ((numbers.Real,), "a number"),
    "bool": ((bool,), "True or False"),
    "str": ((str, os.PathLike), "text"),
    **dict.fromkeys(("tuple", "list", "Sequence"), ((tuple, list), "a tuple")),
    "None": ((type(None),), "None"),
}


def lookup(folder: str, name: str) -> type:
    """The class that a name stands for. Files are those of `src.<folder>`; only the chosen module is imported.

    Raises ValueError, in one sentence that lists what there is, when the file, module or class does not exist or when
    a name without a class is ambiguous.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name for {PACKAGE}/{folder} must be text such as 'file' or 'file:Class', not {name!r}")
    module, _, wanted = name.partition(":")
    if _is_dotted(module):
        loaded = _import(module)
        own = [key for key, value in vars(loaded).items() if _is_public_class(key, value, module)]
        if wanted and wanted not in own and inspect.isclass(getattr(loaded, wanted, None)):
            return getattr(loaded, wanted)  # imported there from another module
        return getattr(loaded, _choose(name, module, own))
    *inner, last = module.split("/")
    if all(part.isidentifier() for part in inner):
        folder, module = "/".join([folder, *inner]), last
    files = sorted(path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_"))
    file = f"{PACKAGE}/{folder}/{module}.py"
    if module not in files:
        raise ValueError(f"there is no {file}{_hint(module, files)}; files there: {_names(files)}")
    chosen = _choose(name, file, _public_classes(ROOT / folder / f"{module}.py"))
    return getattr(importlib.import_module(f"{PACKAGE}.{folder.replace('/', '.')}.{module}"), chosen)


def build(folder: str, config: Mapping[str, Any], *, where: str = "", **extra: Any) -> Any:
    """An instance of the class `config["name"]`, with the other keys and `extra` as constructor arguments.

    A group among the keys that has a `name` is built first, also one inside a list, a tuple or a group without a name;
    it gets nothing of `extra`. Its name is looked up in the folder that its parent's `PARTS: ClassVar[dict[str, str]]`
    gives for the argument, else in `folder`. `where` is the path of the group in the config, for messages.

    Raises ValueError when `name` is missing or unknown, for an unknown, doubled or missing argument, and with `where`
    in front for what a constructor refuses.
    """
    at = f"{where}: " if where else ""
    if not isinstance(config, Mapping | ConfigDict):
        raise ValueError(f"{at}a part of {PACKAGE}/{folder} is a group {{'name': …}}, not {config!r}")
    arguments = {key: config[key] for key in config}
    if "name" not in arguments:
        meant = _hint("name", arguments)
        raise ValueError(f"{at}a config for {PACKAGE}/{folder} needs a 'name'{meant}; it has only: {_names(arguments)}")
    name = arguments.pop("name")
    try:
        cls = lookup(folder, name)
    except ValueError as error:
        raise ValueError(f"{at}{error}") from error
    module = name.partition(":")[0]
    part = f"{at}{cls.__name__} ({module if _is_dotted(module) else f'{PACKAGE}/{folder}/{module}.py'})"
    doubled = sorted(set(arguments) & set(extra))
    if doubled:
        raise ValueError(f"{part} gets {_names(doubled)} from the program; remove it from the config")
    check_arguments(cls, {**arguments, **extra}, where=part)
    check_kinds(cls, arguments, where=part)
    folders = getattr(cls, "PARTS", {})
    for key, value in arguments.items():
        arguments[key] = _built(folders.get(key, folder), value, f"{where}.{key}" if where else key)
    try:
        with telling(part, config):
            return cls(**arguments, **extra)
    except ValueError as error:
        named = not where or _names_path(str(error), where)
        raise ValueError(str(error) if named else f"{where}: {error}") from error


def check_arguments(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, naming `where` and the accepted arguments, when `cls(**arguments)` would not bind."""
    found = parameters(cls)
    if any(p.kind is p.VAR_KEYWORD for p in found):
        return
    accepted = [p.name for p in found if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in arguments:
        if key not in accepted:
            raise ValueError(f"{where} has no argument {key!r}{_hint(key, accepted)}; it accepts: {_names(accepted)}")
    required = [p.name for p in found if p.name in accepted and p.default is p.empty]
    missing = [key for key in required if key not in arguments]
    if missing:
        raise ValueError(f"{where} needs {_names(missing)}, which the config does not give")


def check_kinds(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, naming `where`, for an argument of another kind than its annotation says, where that is one of
    `KINDS`, None, or several of these."""
    for parameter in parameters(cls):
        if parameter.name not in arguments or parameter.kind is parameter.VAR_KEYWORD:
            continue
        told = parameter.annotation
        told = told if isinstance(told, str) else getattr(told, "__name__", "") if inspect.isclass(told) else str(told)
        names = [name.partition("[")[0].strip() for name in told.split("|")]
        value = arguments[parameter.name]
        if any(name not in KINDS for name in names) or any(_is_kind(value, KINDS[name][0]) for name in names):
            continue
        wanted = " or ".join(KINDS[name][1] for name in names)
        raise ValueError(f"{where} has {parameter.name}={_short(value)}; it must be {wanted}")


@contextlib.contextmanager
def telling(where: str, options: Mapping[str, Any] | ConfigDict) -> Iterator[None]:
    """What else than ValueError is raised inside because of options of the config, as a ValueError that has them."""
    try:
        yield
    except (TypeError, AttributeError, LookupError, ArithmeticError) as error:
        if _names_path(str(error), where.partition(":")[0]):
            raise ValueError(str(error)) from error
        given = ", ".join(f"{key}={_short(options[key])}" for key in options if key != "name")
        kind, reason = type(error).__name__, " ".join(str(error).split())
        told = f"with the options {given}" if given else "without options"
        raise ValueError(f"{where} fails {told}: {kind}: {reason} (--traceback shows where)") from error


def _is_kind(value: Any, kinds: tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and (not isinstance(value, bool) or bool in kinds)


def _short(value: Any) -> str:
    text = repr(value.to_dict() if isinstance(value, ConfigDict) else value)
    return text if len(text) < 60 else f"{text[:60]}…"


def parameters(cls: type) -> list[inspect.Parameter]:
    """The parameters of a class's constructor, without `self`."""
    # The metaclasses of module libraries hide the constructor's signature, so take that of the constructor itself.
    constructor = cls.__init__ if cls.__init__ is not object.__init__ else cls.__new__
    if constructor is object.__new__:
        return []
    return list(inspect.signature(constructor).parameters.values())[1:]


def _built(folder: str, value: Any, where: str) -> Any:
    """An option's value, with every group that has a name replaced by its part."""
    if isinstance(value, list | tuple):
        return type(value)(_built(folder, item, f"{where}[{i}]") for i, item in enumerate(value))
    if not isinstance(value, Mapping | ConfigDict):
        return value
    if "name" in value:
        return build(folder, value, where=where)
    if meant := _misspelt_name(value):
        raise ValueError(f"{where} has no 'name' but {meant!r}: a part is chosen by its name")
    return {key: _built(folder, value[key], f"{where}.{key}") for key in value}


def _misspelt_name(group: Mapping[str, Any] | ConfigDict) -> str:
    """The key of a group without a name that is most likely meant as one, "" for none."""
    texts = [key for key in group if isinstance(group[key], str) and key != "names"]
    return nearest("name", texts)


def _choose(name: str, place: str, classes: list[str]) -> str:
    """The class that a name means among the public ones of a file or module."""
    wanted = name.partition(":")[2]
    if wanted in classes:
        return wanted
    if wanted:
        raise ValueError(f"{place} has no public class {wanted}{_hint(wanted, classes)}; it has: {_names(classes)}")
    if len(classes) == 1:
        return classes[0]
    advice = "; write file:Class" if classes else ""
    found = f"{place} has {len(classes)} public classes ({_names(classes)})"
    raise ValueError(f"name {name!r} is not enough, because {found}{advice}")


def _is_dotted(module: str) -> bool:
    return "." in module and all(part.isidentifier() for part in module.split("."))


def _import(module: str) -> Any:
    """A module of another package. Raises ValueError when there is none, or when it cannot be imported."""
    try:
        return importlib.import_module(module)
    except (ImportError, SyntaxError) as error:
        if not isinstance(error, ModuleNotFoundError) or not f"{module}.".startswith(f"{error.name}."):
            raise ValueError(f"the module {module} cannot be imported: {error}") from error
        parent, _, last = error.name.rpartition(".")
        modules = [m.name for m in pkgutil.iter_modules(getattr(sys.modules.get(parent), "__path__", ()))]
        hint = f"{_hint(last, modules)}; modules there: {_names(modules)}" if parent else ""
        advice = "" if parent else "; a name with a dot is package.module:Class of a package that Python can import"
        raise ValueError(f"there is no module {error.name}{hint}{advice}") from error


def _is_public_class(key: str, value: Any, module: str) -> bool:
    return inspect.isclass(value) and value.__module__ == module and not key.startswith("_")


def _names_path(message: str, where: str) -> bool:
    """Whether a message already names its group of the config: it has `where`, or begins beside it."""
    return ("." in where and where in message) or message.startswith(f"{where.partition('.')[0]}.")


def _public_classes(path: Path) -> list[str]:
    tree = _parse(path)
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_")]


def _parse(path: Path) -> ast.Module:
    text = path.read_text(encoding="utf-8")
    for _ in range(TRIES):
        # Up to Python 3.11.7 threads that parse at one time disturb a counter of each other (CPython issue 106905).
        with contextlib.suppress(SystemError):
            return ast.parse(text, filename=str(path))
    return ast.parse(text, filename=str(path))


def nearest(word: str, choices: Iterable[str]) -> str:
    """The choice that is most like a word, "" where none is."""
    return next(iter(difflib.get_close_matches(word, list(choices), n=1)), "")


def _hint(word: str, choices: Iterable[str]) -> str:
    near = nearest(word, choices)
    return f" (did you mean {near}?)" if near else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
