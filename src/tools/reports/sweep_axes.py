"""What a sweep varies: `guidance=1,1.5 steps=10,25`, as fields of a config."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from src.common.lookup import nearest
from src.common.tree import listed

STEP = "step"  # the checkpoint
LAST = "last"  # ema=last: the last parameters
# Short names, and what they are in a config; `steps` and `sampler` are those of each generated field that has them.
SHORT = ("guidance", "ema", "width", "steps", "sampler", STEP)
Point = dict[str, Any]  # a value of each axis by name


class Axis(NamedTuple):
    """A name and its values."""

    name: str
    values: tuple[Any, ...]


def split_axes(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The flags of a command line, and its words `name=values`."""
    axes = [word for word in argv[1:] if not word.startswith("-") and "=" in word]
    return [word for word in argv if word not in axes], axes


def parse_axes(words: Sequence[str], config: Any) -> list[Axis]:
    """The axes; values are separated by commas, outside of brackets.

    Raises ValueError, in one sentence, without words, for a name that is there twice, no short name and no field of the
    config, and for values that the field cannot have.
    """
    if not words:
        raise ValueError("nothing is varied: add words such as guidance=1,1.25,1.5 or steps=10,25,50")
    axes = []
    for word in words:
        name, _, text = word.partition("=")
        values = _values(text)
        if not values or len({repr(value) for value in values}) < len(values):
            raise ValueError(f"{word}: give different values, separated by commas")
        if name in [axis.name for axis in axes]:
            raise ValueError(f"{name} is varied twice: give it once, with all values")
        axes.append(Axis(name, values))
        for value in values:
            overrides({name: value}, config)
    return axes


def points_of(axes: Sequence[Axis]) -> list[Point]:
    """All combinations; what chooses the parameters varies slowest, so that each is read once."""
    order = sorted(axes, key=lambda axis: (STEP, "width", "ema").index(axis.name) if axis.name in
                   (STEP, "width", "ema") else 3)  # fmt: skip
    names = [axis.name for axis in axes]
    found = [dict(zip([a.name for a in order], each, strict=True)) for each in
             itertools.product(*(axis.values for axis in order))]  # fmt: skip
    return [{name: point[name] for name in names} for point in found]


def overrides(point: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """The fields of the config, by dotted path, that a point sets; `step` is none.

    Raises ValueError, in one sentence, for a name or value that the config does not have.
    """
    found: dict[str, Any] = {}
    for name, value in point.items():
        if name == STEP:
            if not (isinstance(value, int) and value >= 0) and value not in ("latest", "best"):
                raise ValueError(f"step={value} is no checkpoint: give steps, latest or best")
            continue
        for path in _paths(name, config):
            found |= _set(path, value, name, config)
    return found


def changed(config: Any, point: Mapping[str, Any]) -> Any:
    """A copy of the config with the values of a point."""
    new = config.copy_and_resolve_references()
    for path, value in overrides(point, config).items():
        group, last = _group(new, path)
        group[last] = value
    return new


def _paths(name: str, config: Any) -> list[str]:
    known = {"guidance": ["guidance.scale"], "ema": ["eval.decay"], "width": ["eval.width"]}
    known["steps"] = [f"decode.{row}.steps" for row in config.decode if "steps" in config.decode[row]]
    known["sampler"] = [f"fields.{row}.step.name" for row in config.fields if "step" in config.fields[row]]
    if name in known:
        if not known[name]:
            raise ValueError(f"{name}: the config has no field for it; give its dotted path")
        return known[name]
    group, last = _group(config, name)
    if group is None or last not in group:
        hint = nearest(name, SHORT)
        raise ValueError(
            f"{name} is neither {listed(SHORT)} nor a field of the config" + (f"; did you mean {hint}?" if hint else "")
        )
    return [name]


def _set(path: str, value: Any, name: str, config: Any) -> dict[str, Any]:
    if name == "ema":
        if value == LAST:
            return {"eval.ema": False, path: 0.0}
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"ema={value}: give decays that the run keeps, or {LAST}")
        return {"eval.ema": True, path: float(value)}
    group, last = _group(config, path)
    was = group[last]
    if isinstance(was, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(was) and not (isinstance(was, tuple | list) and isinstance(value, tuple)):
        raise ValueError(f"{name}={value}: {path} is {was!r}; give values of its kind")
    return {path: value} | ({"eval.ema": True} if path == "eval.width" else {})


def _group(config: Any, path: str) -> tuple[Any, str]:
    *groups, last = path.split(".")
    for part in groups:
        config = config[part] if hasattr(config, "keys") and part in config else None
    return (config, last) if hasattr(config, "keys") else (None, last)


def _values(text: str) -> tuple[Any, ...]:
    parts, depth, word = [], 0, ""
    for sign in text:
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and depth == 0:
            parts, word = [*parts, word], ""
        else:
            word += sign
    return tuple(_value(part.strip()) for part in (*parts, word) if part.strip())


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
