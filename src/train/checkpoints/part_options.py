"""What a config leaves out: the options of parts that their classes have defaults for, and those for sampling alone.

The parts are found as `common.lookup.build` finds them: the folders of the outermost are here, those of the parts
inside them are given by their class's `PARTS`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from src.common.lookup import build, lookup, parameters

ABSENT = "absent"
FOLDERS = {
    "fields.*.codec": "codecs",
    "fields.*.embed": "models/embedders",
    "fields.*.head": "models/heads",
    "fields.*.process": "corruption",
    "fields.*.step": "sampling/steps",
    "model.conditioning": "models",
    "tasks.*.source": "data/sources",
    "tasks.*.template": "data/templates",
    "tasks.*.objectives.*": "objectives",
}
FIXED = {"model.trunk": "transformer:Transformer", "model.time": "conditioning:TimestepEmbedder"}  # without a `name`


def default(option: str, config: Mapping[str, Any]) -> Any:
    """What the class of a part takes for an option, `fields.image.head.bias`, that is not given; ABSENT where there is
    no such part or option, or it must be given.

    config   values by dotted path; the class is the one that it names
    """
    group, _, name = option.rpartition(".")
    cls = part_class(group, config)
    found = next((p.default for p in parameters(cls) if p.name == name), ABSENT) if cls and name != "name" else ABSENT
    if dataclasses.is_dataclass(cls) and found is not ABSENT:
        factory = {f.name: f.default_factory for f in dataclasses.fields(cls)}.get(name, dataclasses.MISSING)
        found = found if factory is dataclasses.MISSING else factory()
    return ABSENT if isinstance(found, type) else found  # `Parameter.empty` is a class


def is_default_part(option: str, config: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether an option belongs to a part that only `config` describes, and it is the one that is made without it."""
    group, _, last = option.rpartition(".")
    while last and not any(name == group or name.startswith(f"{group}.") for name in other):
        usual, cls = default(group, config), part_class(group, config)
        if usual is not ABSENT and type(usual) is cls:
            return _same(usual, _made(group, config))
        group, _, last = group.rpartition(".")
    return False


def only_for_sampling(option: str, config: Mapping[str, Any]) -> bool:
    """Whether the class of a part says that an option changes nothing but samples: its `SAMPLING: ClassVar`."""
    group, _, name = option.rpartition(".")
    return name in getattr(part_class(group, config), "SAMPLING", ())


def part_class(group: str, config: Mapping[str, Any]) -> type | None:
    """The class of a group of the config, or None."""
    folder = _folder(group, config)
    return None if folder is None else _named(folder, FIXED.get(group, config.get(f"{group}.name")))


def _folder(group: str, config: Mapping[str, Any]) -> str | None:
    """Where the name of a group is looked up."""
    if group in FIXED:
        return "models"
    words = group.split(".")
    for pattern, folder in FOLDERS.items():
        wanted = pattern.split(".")
        if len(words) < len(wanted) or not all(b in ("*", a) for a, b in zip(words, wanted, strict=False)):
            continue
        for depth in range(len(wanted), len(words)):
            cls = _named(folder, config.get(f"{'.'.join(words[:depth])}.name"))
            folder = getattr(cls, "PARTS", {}).get(words[depth], folder)
        return folder
    return None


def _named(folder: str, name: Any) -> type | None:
    try:
        return lookup(folder, name)
    except (ValueError, ImportError):  # no part of today
        return None


def _made(group: str, config: Mapping[str, Any]) -> Any:
    """The part of a group, or None where it cannot be built of the config alone."""
    nested: dict[str, Any] = {}
    for path, value in config.items():
        if path.startswith(f"{group}."):
            *outer, last = path.removeprefix(f"{group}.").split(".")
            inner = nested
            for key in outer:
                inner = inner.setdefault(key, {})
            inner[last] = value
    try:
        return build(_folder(group, config), nested)
    except (ValueError, ImportError):
        return None


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (a == b or (not dataclasses.is_dataclass(a) and vars(a) == vars(b)))
