"""Whether a run may go on from what another config left behind."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

FREE = ("steps", "log", "eval", "checkpoint", "sample", "guard", "doctor", "watchdog")
# What may change while the fingerprint of it stays: of the tokenizer, of the weights that the run began from, and of
# frozen networks.
WHERE = {
    "tokenizer": ("text_codec.path", "text_codec.folder"),
    "weights": ("init_from.path",),
    "frozen.image": ("image_codec.path",),
    "frozen.vision": ("vision.path",),
}
# What a config means that does not have the field, because it was made before there was one, or after it was dropped.
ASSUMED: dict[str, Any] = {
    "model.lora.alpha": 16.0,
    "model.lora.rank": 0,
    "model.lora.targets": "attention/(q|k|v|out)|mlp/(gate|up|down)",
    "model.trunk.attention": "auto",
    "model.trunk.copies": [],
    "model.text_head.chunk": 8192,
    "optim.moments": "full",
    "optim.decays": (),
    "image_codec.name": "",
    "image_codec.path": "",
    "image_codec.dtype": "float32",
    "vision.dtype": "float32",
    "vision.name": "",
    "vision.path": "",
    "model.vision.init": "lecun_normal",
    "frozen": {},
    "init_from.path": "",
    "init_from.ema": False,
    "init_from.skip": (),
    "weights": None,
    "teacher.dtype": "float32",
    "text_codec.pieces": 32_000,
}
RENAMED: dict[str, str] = {}  # a field, or all below it, of older configs: its name now
ABSENT = "absent"


def check_config(old: Any, new: Any, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between a checkpoint's config and this run's, `{"steps": (old, new)}`, to be logged.

    Fields that equal a name in `free`, or lie below one, may differ. One that only one of the configs has is taken for
    its value in ASSUMED, and RENAMED fields of the old one are compared under their new name. Raises ValueError with
    the list of the others, and what to do about each.
    """
    before = {_renamed(field): value for field, value in fields(plain(old)).items()}
    after = fields(plain(new))
    for name, where in WHERE.items():
        if before.get(name) is not None and before.get(name) == after.get(name):
            free = (*free, *where)
    changed = {
        field: (before.get(field, ABSENT), after.get(field, ABSENT))
        for field in sorted(before.keys() | after.keys())
        if field not in before or field not in after or not _same(before[field], after[field])
    }
    locked = {
        field: values
        for field, values in changed.items()
        if not any(field == name or field.startswith(f"{name}.") for name in free) and not _as_before(field, *values)
    }
    if locked:
        rows = "; ".join(f"{field}: {was!r} -> {now!r}" for field, (was, now) in locked.items())
        advice = ", ".join(_advice(field, was, now, after) for field, (was, now) in locked.items())
        raise ValueError(
            f"the run in this workdir was made with another config ({rows}): to go on with it, {advice};"
            " or choose another --workdir for the new config"
        )
    return changed


def _renamed(field: str) -> str:
    for old, new in RENAMED.items():
        if field == old or field.startswith(f"{old}."):
            return new + field.removeprefix(old)
    return field


def _as_before(field: str, was: Any, now: Any) -> bool:
    """Whether a field that one of the configs does not have says in the other one what was always done."""
    return ABSENT in (was, now) and field in ASSUMED and _same(plain(ASSUMED[field]), now if was == ABSENT else was)


def _advice(field: str, was: Any, now: Any, config: dict[str, Any]) -> str:
    """What a person does about one field."""
    if field == "tokenizer":
        where = config.get("text_codec.path") or config.get("text_codec.folder")
        place = f"at {where}" if where else "trained on the tasks' own texts"
        return f"bring back the tokenizer with the fingerprint {was} (the one {place} has {now})"
    if field == "weights":
        return "give the initial weights that it began from (init_from), whose hash is the first of the two"
    if field.startswith("frozen."):  # frozen.image, frozen.vision: found in files, no field that can be set
        codec = "vision" if field.endswith(".vision") else "image_codec"
        with_it = f"give the {codec} that it began with (the same files at {codec}.path)"
        return f"take out {codec}, without which it began" if was == ABSENT else with_it
    was = ASSUMED.get(field, was) if was == ABSENT else was
    if was == ABSENT:
        return f"take {field} out of the config file"
    if now == ABSENT:
        return f"put {field} = {was!r} into the config file"
    if isinstance(was, str | int | float):  # what a flag can say
        return f"add --config.{field}={was}"
    return f"set {field} back to {was!r} in the config file"


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
