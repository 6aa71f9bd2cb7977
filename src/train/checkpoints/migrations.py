"""Checkpoints of earlier formats, read as if this version had written them. Nothing on disk changes.

A migration maps (meta, data) of one format to the next one: the names of leaves (`moved`: path now -> path then, where
they differ), leaves that are new (`fill`: path -> the value of all its elements), and the fields of the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

Meta = dict[str, Any]
Migration = Callable[[Meta, Meta], tuple[Meta, Meta]]


def _from_1(meta: Meta, data: Meta) -> tuple[Meta, Meta]:
    """Format 1 had no seed and no guard in the state, and of the position only the rows consumed, at a log line."""
    guard = {f"extra/guard/{name}": 0 for name in ("skipped", "streak", "restored", "norms")}
    fill = {"extra/seed": meta["config"].get("seed", 0)} | guard
    counts = {name: {} for name in ("read", "skipped", "told")}
    position = {"rows": data["value"], "counts": counts, "meter": {"steps": 0, "taken": 0, "sums": {}}}
    return meta | {"fill": fill}, data | {"value": position}


# Files that moved, as the values of `name` in a config: (what it is part of, old, new).
_NAMES_2 = (
    (r"\.times(\.base)*\.name$", "times:", "timesteps:"),
    (r"\.loss_weight\.name$", "weights:", "weighting:"),
    (r"^sample\.text\.name$", "tokens:", "next_token:"),
    (r"\.objectives\.\w+\.name$", "denoise", "diffusion"),
    (r"^image_codec\.name$", "latents", "vae_latents"),
)


def _from_2(meta: Meta, data: Meta) -> tuple[Meta, Meta]:
    """Format 2 had other names of files in the config."""

    def renamed(path: str, value: Any) -> Any:
        for place, old, new in _NAMES_2:
            if isinstance(value, str) and re.search(place, path) and value.startswith(old):
                return new + value.removeprefix(old)
        return value

    return meta | {"config": _mapped(meta["config"], renamed)}, data


def _mapped(value: Any, change: Callable[[str, Any], Any], path: str = "") -> Any:
    """A nested dict with `change(dotted path, value)` for its values."""
    if not isinstance(value, dict):
        return change(path, value)
    return {key: _mapped(inner, change, f"{path}.{key}" if path else key) for key, inner in value.items()}


# By format: (meta, data) of that format -> (meta, data) of the next one.
MIGRATIONS: dict[int, Migration] = {1: _from_1, 2: _from_2}
