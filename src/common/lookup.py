"""Name = file: `"blackout"` on the corruption floor is the public class of `src/corruption/blackout.py`."""

from __future__ import annotations

import ast
import contextlib
import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

PACKAGE = __name__.split(".")[0]
ROOT = Path(__file__).resolve().parents[1]
TRIES = 4


def lookup(folder: str, name: str) -> type:
    """The class that a name stands for: `"file"` is the file's one public class, `"file:Class"` that class, and
    `"folder/file:Class"` one of a folder below.

    Files are those of the package `src.<folder>`; only the chosen one is imported. Raises ValueError, in one sentence
    that lists what there is, when the file or class does not exist or when a bare file name is ambiguous.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"a name for {PACKAGE}/{folder} must be text such as 'file' or 'file:Class', not {name!r}")
    module, _, wanted = name.partition(":")
    *inner, last = module.split("/")
    if all(part.isidentifier() for part in inner):
        folder, module = "/".join([folder, *inner]), last
    files = sorted(path.stem for path in (ROOT / folder).glob("*.py") if not path.stem.startswith("_"))
    if module not in files:
        raise ValueError(
            f"there is no {PACKAGE}/{folder}/{module}.py{_hint(module, files)}; files there: {_names(files)}"
        )
    file = f"{PACKAGE}/{folder}/{module}.py"
    classes = _public_classes(ROOT / folder / f"{module}.py")
    if not wanted:
        if len(classes) != 1:
            raise ValueError(
                f"name {name!r} is not enough, because {file} has {len(classes)} public classes ({_names(classes)})"
                + ("; write file:Class" if classes else "")
            )
        wanted = classes[0]
    if wanted not in classes:
        raise ValueError(f"{file} has no public class {wanted}{_hint(wanted, classes)}; it has: {_names(classes)}")
    return getattr(importlib.import_module(f"{PACKAGE}.{folder.replace('/', '.')}.{module}"), wanted)


def build(folder: str, config: Mapping[str, Any], **extra: Any) -> Any:
    """An instance of the class `config["name"]`, with the other keys (and `extra`) as constructor arguments.

    Raises ValueError when `name` is missing or unknown, and for an unknown, doubled or missing argument.
    """
    config = {key: config[key] for key in config}
    if "name" not in config:
        raise ValueError(f"a config for {PACKAGE}/{folder} needs a 'name'; it has only: {_names(config)}")
    name = config.pop("name")
    cls = lookup(folder, name)
    file = f"{PACKAGE}/{folder}/{name.partition(':')[0]}.py"
    doubled = sorted(set(config) & set(extra))
    if doubled:
        raise ValueError(f"{cls.__name__} ({file}) gets {_names(doubled)} from the program; remove it from the config")
    arguments = {**config, **extra}
    check_arguments(cls, arguments, where=f"{cls.__name__} ({file})")
    return cls(**arguments)


def check_arguments(cls: type, arguments: Mapping[str, Any], where: str) -> None:
    """Raises ValueError, naming `where` and the accepted arguments, when `cls(**arguments)` would not bind."""
    parameters = _parameters(cls)
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return
    accepted = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    for key in arguments:
        if key not in accepted:
            raise ValueError(f"{where} has no argument {key!r}{_hint(key, accepted)}; it accepts: {_names(accepted)}")
    required = [p.name for p in parameters if p.name in accepted and p.default is p.empty]
    missing = [key for key in required if key not in arguments]
    if missing:
        raise ValueError(f"{where} needs {_names(missing)}, which the config does not give")


def _parameters(cls: type) -> list[inspect.Parameter]:
    # The metaclasses of module libraries hide the constructor's signature, so ask the constructor itself.
    constructor = cls.__init__ if cls.__init__ is not object.__init__ else cls.__new__
    if constructor is object.__new__:
        return []
    return list(inspect.signature(constructor).parameters.values())[1:]


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


def _hint(word: str, choices: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _names(names: Iterable[str]) -> str:
    return ", ".join(names) or "nothing"
