"""Whether a run may go on from what another config left behind."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

FREE = ("steps", "log", "eval", "checkpoint", "sample")


def check_config(old: Any, new: Any, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between a checkpoint's config and this run's, `{"steps": (old, new)}`, to be logged.

    Fields that equal a name in `free`, or lie below one, may differ. Raises ValueError with the list of the others.
    """
    before, after = fields(plain(old)), fields(plain(new))
    changed = {
        field: (before.get(field, "absent"), after.get(field, "absent"))
        for field in sorted(before.keys() | after.keys())
        if field not in before or field not in after or not _same(before[field], after[field])
    }
    locked = {f: v for f, v in changed.items() if not any(f == name or f.startswith(f"{name}.") for name in free)}
    if locked:
        rows = "; ".join(f"{field}: {was!r} -> {now!r}" for field, (was, now) in locked.items())
        raise ValueError(
            f"the run in this workdir was made with another config ({rows}): set these fields back to go on with it,"
            " or choose another --workdir for the new config"
        )
    return changed


def plain(value: Any) -> Any:
    """`value` as JSON gives it back: ConfigDicts become dicts, tuples lists, numpy numbers numbers, the rest text."""

    def convert(item: Any) -> Any:
        if hasattr(item, "to_dict"):
            return item.to_dict()
        if isinstance(item, np.ndarray | np.generic | jax.Array):
            return np.asarray(item).tolist()
        return str(item)

    return json.loads(json.dumps(value, default=convert))


def fields(value: Any, prefix: str = "") -> dict[str, Any]:
    """The values of nested dicts by dotted path: `{"optim.lr": 0.001}`."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= fields(inner, f"{prefix}.{key}" if prefix else key)
    return flat


def _same(a: Any, b: Any) -> bool:
    # Text compares NaN with itself, == compares 1 with 1.0.
    return a == b or json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
