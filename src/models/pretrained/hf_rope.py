"""Rotary frequencies in a published `config.json` <-> `rope_theta` and `rope_scaling` of the trunk.

transformers up to 4 has `rope_theta` and the table `rope_scaling`, transformers 5 one table `rope_parameters` with
both, whose theta comes first; the kind is `rope_type`, or `type` in older files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from src.common.files.paths import shown
from src.common.tree import listed

TABLES = ("rope_parameters", "rope_scaling")
THETA = 10_000.0  # of transformers, where none is given
# Of each kind the numbers, in the order of the trunk's `rope_scaling`, and their lowest and highest value.
KINDS: dict[str, dict[str, tuple[int | float, int | float]]] = {
    "default": {},
    "linear": {"factor": (1e-3, 1e6)},
    "dynamic": {"factor": (1, 1e6), "max_position_embeddings": (1, 2**24)},
    "llama3": {
        "factor": (1e-3, 1e6),
        "low_freq_factor": (1e-3, 1e6),
        "high_freq_factor": (1e-3, 1e6),
        "original_max_position_embeddings": (1, 2**24),
    },
    "yarn": {
        "factor": (1e-3, 1e6),
        "beta_fast": (1e-3, 1e6),
        "beta_slow": (1e-3, 1e6),
        "original_max_position_embeddings": (1, 2**24),
        "attention_factor": (1e-3, 1e3),
    },
}
# Kinds whose length before scaling transformers takes from the config itself where it is there, not from the table.
LENGTH, FIRST = "original_max_position_embeddings", ("llama3", "yarn")
# Keys of a table beside the numbers of its kind, and numbers that change nothing.
BESIDE = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings")
NOTHING = (("factor", 1), ("attention_factor", 1), ("truncate", True))
MSCALES = ("mscale", "mscale_all_dim")  # of YaRN: they make `attention_factor` where that is not there


def parse_rope(fields: Mapping[str, Any]) -> tuple[Any, tuple[Any, ...], list[str], list[str]]:
    """(theta, the trunk's rope_scaling, what is wrong, what this model lacks); theta is not checked."""
    tables = {name: fields[name] for name in TABLES if fields.get(name) is not None}
    wrong = [f"{name}={shown(table)} is no table" for name, table in tables.items() if not isinstance(table, dict)]
    if wrong:
        return THETA, (), wrong, []
    where, table = " and ".join(tables), {}
    for given in tables.values():
        given = {"rope_type" if name == "type" and "rope_type" not in given else name: given[name] for name in given}
        differ = [name for name in given if name in table and given[name] != table[name]]
        wrong += [f"{where} differ in {listed(differ)}"] if differ else []
        table |= given
    theta = table.get("rope_theta", fields.get("rope_theta", THETA))
    kind = table.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        return theta, (), wrong, [f"{where} is of type {shown(kind)}, here {', '.join(KINDS)} only"]
    lacking = []
    if (part := table.get("partial_rotary_factor", fields.get("partial_rotary_factor"))) not in (None, 1):
        lacking.append(f"partial_rotary_factor={shown(part)}, here 1.0 only")
    if kind in FIRST and fields.get(LENGTH) is not None:
        table |= {LENGTH: fields[LENGTH]}
    if kind == "yarn":
        table = _yarn(table, fields)
    read = {*KINDS[kind], *BESIDE}
    if other := [f"{n}={shown(v)}" for n, v in table.items() if n not in read and not (v is None or (n, v) in NOTHING)]:
        lacking.append(f"{where} of type {kind!r} has {listed(other)}, which that type has not")
    table = {name: fields[name] for name in KINDS[kind] if name in fields} | table
    for name, (low, high) in KINDS[kind].items():
        if type(table.get(name)) not in (int, float) or not low <= table[name] <= high:
            wrong.append(f"{name}={shown(table.get(name))} in {where} is not a number from {low:g} to {high:g}")
    if not wrong and kind == "llama3" and table["high_freq_factor"] <= table["low_freq_factor"]:
        wrong.append(f"high_freq_factor={table['high_freq_factor']} in {where} is not above low_freq_factor")
    if not wrong and kind == "yarn" and table["beta_fast"] <= table["beta_slow"]:
        wrong.append(f"beta_fast={table['beta_fast']} in {where} is not above beta_slow")
    numbers = tuple(table.get(name) for name in KINDS[kind])
    plain = kind == "default" or (kind == "linear" and numbers == (1,))
    return theta, () if plain else (kind, *numbers), wrong, lacking


def _yarn(table: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """A table of YaRN with the numbers that transformers takes where they are absent."""
    given = {name: value for name, value in table.items() if value is not None}
    length = fields.get("max_position_embeddings")
    numbers = lambda *names: all(type(given.get(name)) in (int, float) and given[name] > 0 for name in names)
    if "factor" not in given and numbers("original_max_position_embeddings"):
        given |= {"factor": length / given["original_max_position_embeddings"]} if type(length) is int else {}
    if "attention_factor" not in given and numbers("factor"):
        scale = lambda m=1.0: 0.1 * m * math.log(max(given["factor"], 1)) + 1
        both = numbers(*MSCALES)
        given["attention_factor"] = scale(given[MSCALES[0]]) / scale(given[MSCALES[1]]) if both else scale()
    given = {name: value for name, value in given.items() if name not in MSCALES}
    return {"beta_fast": 32, "beta_slow": 1, "original_max_position_embeddings": length} | given


def published_rope(scaling: Sequence[Any]) -> dict[str, Any] | None:
    """`rope_scaling` of config.json for that of the trunk, in the form that old and new transformers read."""
    if not scaling:
        return None
    kind, *numbers = scaling
    name = "type" if kind in ("linear", "dynamic") else "rope_type"  # 4.38 takes `type` and `factor` alone
    told = dict(zip(KINDS[kind], numbers, strict=True))
    return {name: kind} | {name: value for name, value in told.items() if name != "max_position_embeddings"}


def published_length(scaling: Sequence[Any], otherwise: int) -> int:
    """`max_position_embeddings` of config.json: `dynamic` counts from it, and other scaled rotations reach so far."""
    told = dict(zip(KINDS[scaling[0]], scaling[1:], strict=True)) if scaling else {}
    length = told.get("original_max_position_embeddings")
    reached = otherwise if length is None else round(length * told["factor"])
    return told.get("max_position_embeddings", max(otherwise, reached))
