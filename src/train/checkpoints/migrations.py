"""Migrations of checkpoints of earlier formats, applied when they are read; files are not changed.

A migration maps (meta, data) of one format to the next one: paths of leaves (`moved`: new path -> old path, where they
differ), new leaves (`fill`: path -> value of all elements), and config fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from src.models.pretrained.old_paths import path_now
from src.train.checkpoints.migrations_config_2 import config_now

Meta = dict[str, Any]
Migration = Callable[[Meta, Meta], tuple[Meta, Meta]]


def _from_1(meta: Meta, data: Meta) -> tuple[Meta, Meta]:
    """Format 1 had no seed and no guard in the state, and only the consumed rows as position."""
    guard = {f"extra/guard/{name}": 0 for name in ("skipped", "streak", "restored", "norms")}
    fill = {"extra/seed": meta["config"].get("seed", 0)} | guard
    counts = {name: {} for name in ("read", "skipped", "told")}
    position = {"rows": data["value"], "counts": counts, "meter": {"steps": 0, "taken": 0, "sums": {}}}
    return meta | {"fill": fill}, data | {"value": position}


def _from_2(meta: Meta, data: Meta) -> tuple[Meta, Meta]:
    """Format 2 had no table of fields: parameters and their optimizer state had other paths, configs other groups, and
    the loss of text the name `nats`."""
    parameters = {path.removeprefix("params/") for path in meta["leaves"] if path.startswith("params/")}
    moved = {_leaf_now(path, parameters): path for path in meta["leaves"]}
    leaves = {now: meta["leaves"][then] for now, then in moved.items()}
    moved = {now: then for now, then in moved.items() if now != then}
    config = config_now(meta["config"], meta["leaves"])
    value = data["value"]
    if isinstance(value, dict) and isinstance(value.get("meter"), dict):
        sums = {re.sub("/nats$", "/nll", name): pair for name, pair in value["meter"]["sums"].items()}
        value = value | {"meter": value["meter"] | {"sums": sums}}
    return meta | {"leaves": leaves, "moved": moved, "config": config}, data | {"value": value}


def _leaf_now(path: str, parameters: set[str]) -> str:
    """The new path of a leaf whose path ends with that of a parameter (parameter, average, moments, teacher)."""
    parts = path.split("/")
    for place in range(len(parts)):
        end = "/".join(parts[place:])
        if end in parameters:
            return "/".join([*parts[:place], path_now(end)])
    return path


# By format: (meta, data) of that format -> (meta, data) of the next one.
MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2}
