"""Config changes: whether a run may resume from a checkpoint with another config."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import jax
import numpy as np

from src.train.checkpoints.part_options import ABSENT, default, is_default_part, only_for_sampling
from src.train.muon import MuonConfig

FREE = (
    *("steps", "log", "eval", "checkpoint", "sample", "decode", "guidance", "guard", "doctor", "watchdog"),
    *("compiled_step", "fields.*.step"),
)
PLACES = ("path", "folder")  # options of codec links that may differ if the fingerprint is the same (see `_elsewhere`)
# Values of fields that older or newer configs lack.
ASSUMED: dict[str, Any] = {
    "ema.more": (),
    "ema.power": (),
    "model.lora.alpha": 16.0,
    "model.lora.rank": 0,
    "model.lora.targets": "attention/(q|k|v|out)|mlp/(gate|up|down)",
    "model.trunk.attention": "auto",
    "model.trunk.mot": [],
    "model.trunk.rope_scaling": [],
    "model.trunk.head_dim": 0,
    "model.trunk.qkv_bias": False,
    "model.trunk.sliding_window": 0,
    "optim.moments": "full",
    "optim.decays": (),
    "optim.method": "adamw",
    **{f"optim.muon.{field.name}": field.default for field in dataclasses.fields(MuonConfig)},
    "codecs": {},
    "fields.*.hint": False,
    "fields.*.timed": True,
    "fields.*.time_token": False,
    "init_from.path": "",
    "init_from.ema": False,
    "init_from.skip": (),
    "weights": None,
    "teacher.dtype": "float32",
}
RENAMED: dict[str, str] = {}  # old -> new names of fields, or of all fields below them
# (name of a part, its old option) -> the new one.
RENAMED_OPTIONS = {("token_diffusion", "temperature"): "noise_scale"}


def check_config(old: Any, new: Any, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """The fields that differ between a checkpoint's config and this run's, `{"steps": (old, new)}`, to be logged.

    Fields of `free` and below them may differ, and options that a part's class has in `SAMPLING`; `*` stands for one
    part of a name. A field that only one config has is compared with its value in ASSUMED or the default of its part's
    class (`part_options.py`); RENAMED fields are compared under their new name. Raises ValueError with all other
    differences and advice for each.
    """
    before = fields(plain(old))
    before = {_renamed(field, before): value for field, value in before.items()}
    after = fields(plain(new))
    free = (*free, *_elsewhere(before, after))
    if _schedule_end(before) == _schedule_end(after):
        free = (*free, "optim.steps")
    changed = {
        field: (before.get(field, ABSENT), after.get(field, ABSENT))
        for field in sorted(before.keys() | after.keys())
        if field not in before or field not in after or not _same(before[field], after[field])
    }
    locked = {
        field: values
        for field, values in changed.items()
        if not any(_lies_below(field, name) for name in free)
        and not only_for_sampling(field, after if field in after else before)
        and not _as_before(field, before, after)
    }
    if locked:
        rows = "; ".join(f"{field}: {was!r} -> {now!r}" for field, (was, now) in locked.items())
        advice = ", ".join(_advice(field, was, now, after) for field, (was, now) in locked.items())
        raise ValueError(
            f"the run in this workdir has another config ({rows}): to resume it, {advice};"
            " or choose another --workdir for the new config"
        )
    return changed


def _schedule_end(config: dict[str, Any]) -> Any:
    """The step at which the learning rate's schedule ends: that of the run, unless it has its own."""
    return config.get("optim.steps") or config.get("steps")


def _renamed(field: str, config: dict[str, Any]) -> str:
    part, _, option = field.rpartition(".")
    if now := RENAMED_OPTIONS.get((config.get(f"{part}.name"), option)):
        return f"{part}.{now}"
    for old, new in RENAMED.items():
        if field == old or field.startswith(f"{old}."):
            return new + field.removeprefix(old)
    return field


def _lies_below(field: str, name: str) -> bool:
    """Whether a field equals a name or lies below it; `*` stands for one part of the name."""
    parts, wanted = field.split("."), name.split(".")
    return len(parts) >= len(wanted) and all(b in ("*", a) for a, b in zip(parts, wanted, strict=False))


def _elsewhere(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Paths and folders of initial weights, tokenizers and codec networks whose fingerprints are the same."""
    found = ["init_from.path"] if _equal(before, after, "weights") else []
    for row in sorted({name.split(".")[1] for name in (*before, *after) if name.startswith("codecs.")}):
        found += _places(row) if _equal(before, after, f"codecs.{row}") else []
    return found


def _equal(before: dict[str, Any], after: dict[str, Any], name: str) -> bool:
    """Whether both have fields below a name, with equal values."""
    old, new = ({f: value for f, value in each.items() if _lies_below(f, name)} for each in (before, after))
    return bool(old) and old == new and None not in old.values()


def _places(row: str) -> list[str]:
    return [f"fields.{row}.codec{link}.{option}" for link in ("", ".*") for option in PLACES]


def _as_before(field: str, before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether an option that one of the configs lacks has its default in the other one."""
    if field in before and field in after:
        return False
    config, other = (after, before) if field in after else (before, after)
    usual = next((usual for name, usual in ASSUMED.items() if _is(field, name)), ABSENT)
    return (
        _same(plain(usual), config[field])
        or _same(plain(default(field, config)), config[field])
        or is_default_part(field, config, other)
    )


def _is(field: str, name: str) -> bool:
    return field.count(".") == name.count(".") and _lies_below(field, name)


def _advice(field: str, was: Any, now: Any, config: dict[str, Any]) -> str:
    """Advice about one option."""
    if field == "weights":
        return "set init_from to the run's initial weights, with the first of the two hashes"
    if field.startswith("codecs."):  # a fingerprint of files, not an option
        return _codec_advice(field.split(".")[1], was, now, config)
    was = ASSUMED.get(field, was) if was == ABSENT else was
    if was == ABSENT:
        return f"remove {field} from the config file"
    if now == ABSENT:
        return f"add {field} = {was!r} to the config file"
    if isinstance(was, str | int | float):  # types that a flag can have
        return f"add --config.{field}={was}"
    return f"set {field} back to {was!r} in the config file"


def _codec_advice(row: str, was: Any, now: Any, config: dict[str, Any]) -> str:
    codec = f"fields.{row}.codec"
    if was == ABSENT:
        return f"remove from {codec} the links that the run did not have"
    places = [f"{f}={value}" for f, value in config.items() if value and any(_is(f, name) for name in _places(row))]
    place = f"those at {', '.join(places)} have" if places else "those computed from the tasks' data have"
    return f"restore the files of {codec} with the fingerprint {was} ({place} {now})"


def plain(value: Any) -> Any:
    """`value` as JSON values: ConfigDicts as dicts, tuples as lists, arrays as lists, the rest as text."""

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
    # As text, NaN equals NaN; with ==, 1 equals 1.0.
    return a == b or json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
