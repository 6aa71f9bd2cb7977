"""Rotary frequencies in a published `config.json` <-> `rope_theta` and `rope_scaling` of the trunk.

transformers up to 4 has `rope_theta` and the table `rope_scaling`, transformers 5 one table `rope_parameters` with
both, whose theta comes first; the kind is `rope_type`, or `type` in older files.
"""

from __future__ import annotations

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
    "llama3": {
        "factor": (1e-3, 1e6),
        "low_freq_factor": (1e-3, 1e6),
        "high_freq_factor": (1e-3, 1e6),
        "original_max_position_embeddings": (1, 2**24),
    },
}
# Keys of a table beside the numbers of its kind, and numbers that change nothing.
BESIDE = ("rope_theta", "rope_type", "type", "partial_rotary_factor", "original_max_position_embeddings")
NOTHING = (("factor", 1), ("attention_factor", 1))


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
    read = {*KINDS[kind], *BESIDE}
    if other := [f"{n}={shown(v)}" for n, v in table.items() if n not in read and not (v is None or (n, v) in NOTHING)]:
        lacking.append(f"{where} of type {kind!r} has {listed(other)}, which that type has not")
    table = {name: fields[name] for name in KINDS[kind] if name in fields} | table
    for name, (low, high) in KINDS[kind].items():
        if type(table.get(name)) not in (int, float) or not low <= table[name] <= high:
            wrong.append(f"{name}={shown(table.get(name))} in {where} is not a number from {low:g} to {high:g}")
    if not wrong and kind == "llama3" and table["high_freq_factor"] <= table["low_freq_factor"]:
        wrong.append(f"high_freq_factor={table['high_freq_factor']} in {where} is not above low_freq_factor")
    numbers = tuple(table.get(name) for name in KINDS[kind])
    plain = kind == "default" or (kind == "linear" and numbers == (1,))
    return theta, () if plain else (kind, *numbers), wrong, lacking


def published_rope(scaling: Sequence[Any]) -> dict[str, Any] | None:
    """`rope_scaling` of config.json for that of the trunk, in the form that old and new transformers read."""
    if not scaling:
        return None
    kind, *numbers = scaling
    name = "type" if kind == "linear" else "rope_type"  # 4.38 takes `type` and `factor` alone
    return {name: kind, **dict(zip(KINDS[kind], numbers, strict=True))}
