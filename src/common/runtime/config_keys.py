"""Keys of a config that are unknown or missing are refused before anything is built, wherever the config lies."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from src.common.lookup import nearest
from src.common.runtime.config_dict import TABLES, join, matches, suggestion

CONFIGS = os.path.join(os.path.abspath(__file__ + "/../../../.."), "configs")
TASK = ("weight", "source", "template", "objectives")
FIELD = ("codec", "embed", "head", "process", "step", "learned", "hint", "timed", "time_token")
FORMER = {"share": "weight", "data": "source and template"}  # of a task, before tasks had sources and templates
# Groups whose keys may be left out, because what reads them has defaults.
DEFAULTS = ("compiled_step", "teacher", "mesh", "model", "optim", "sharding", "checkpoint", "watchdog", "doctor")
NEEDED = ("mesh", "model", "optim", "sharding", "checkpoint", "watchdog", "doctor", "model.dtype", "model.trunk")
NEEDED += ("model.conditioning", "model.time", "model.trunk.width", "model.trunk.depth", "model.trunk.heads")
LATER = ("ema.more", "ema.power", "eval.decay", "eval.width")  # keys that configs from before do not have


@functools.cache
def known() -> Any:
    """The groups and keys that there are: `base()` of configs/common.py, whatever other `configs` Python finds."""
    spec = importlib.util.spec_from_file_location("known_config", os.path.join(CONFIGS, "common.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.base()


def check_keys(config: Any) -> None:
    """Raises ValueError, in one sentence with the dotted place and the nearest known key, for a key that is unknown or
    missing, and for a value where a group must be. Options of parts are checked where these are built."""
    _check(config, known(), "", known())
    _check_tasks(config["tasks"])
    for name in config["fields"]:
        _check_row(config["fields"][name], f"fields.{name}", FIELD, ("codec", "embed"))
    for table, rows in (("decode", config["decode"]), ("eval.evaluators", config["eval"]["evaluators"])):
        for name in rows:
            part(rows[name], f"{table}.{name}")
    rows = {*config["fields"], *known()["decode"]}
    for name in config["decode"]:
        if name not in rows:
            raise ValueError(f"decode has no field {name!r}{suggestion(name, sorted(rows), 'fields', {})}")
    part(config["model"]["conditioning"], "model.conditioning")
    own = {*config["fields"], *known()["model"]["mot_fields"]}
    for name in config["model"].get("mot_fields", ()):
        if name not in own:
            hint = suggestion(str(name), config["fields"], "fields", {})
            raise ValueError(f"model.mot_fields has {name!r}, which is no field{hint}")


def _check_tasks(tasks: Any) -> None:
    for name in tasks:
        where = f"tasks.{name}"
        _check_row(tasks[name], where, TASK, TASK)
        _number(tasks[name], where)
        objectives = tasks[name]["objectives"]
        _group(objectives, f"{where}.objectives")
        for label in objectives:
            part(objectives[label], f"{where}.objectives.{label}")
            if "weight" not in objectives[label]:
                meant = nearest("weight", objectives[label])
                raise ValueError(
                    f"{where}.objectives.{label} has no weight"
                    + (f" but {meant!r}: call it weight" if meant else ": give one, as 'weight': 1.0")
                )
            _number(objectives[label], f"{where}.objectives.{label}")
        for key in ("source", "template"):
            part(tasks[name][key], f"{where}.{key}")


def _number(group: Any, where: str) -> None:
    """Raises ValueError unless the weight of a group is a number."""
    weight = group["weight"]
    if not isinstance(weight, int | float) or isinstance(weight, bool):
        raise ValueError(f"the config has {where}.weight={weight!r}; it must be a number")


def part(group: Any, where: str) -> None:
    """Raises ValueError unless a value chooses a part: a group with a name."""
    _group(group, where, "{'name': …}")
    if not group.get("name"):
        meant = nearest("name", group)
        has = f" but {meant!r}" if meant else ""
        raise ValueError(f"{where} needs a 'name'{has}: it chooses a part, as {{'name': …}}")


def _check(group: Any, model: Any, where: str, root: Any) -> None:
    """A group, and those in it, against that of `base()`."""
    _group(group, where)
    for key in group:
        if key not in model:
            place = f"{where} has" if where else "the config has"
            raise ValueError(f"{place} no option {key!r}{suggestion(str(key), model, where, root)}")
    for key in model:
        at = join(where, key)
        if key not in group:
            if at in NEEDED or (at not in LATER and at.partition(".")[0] not in DEFAULTS):
                raise ValueError(f"the config has no {at}; add it, as in configs/common.py")
            continue
        if isinstance(model[key], ConfigDict):
            _group(group[key], at)
            if not any(matches(at, table) for table in TABLES) and "name" not in model[key]:
                _check(group[key], model[key], at, root)


def _check_row(group: Any, where: str, names: tuple[str, ...], needed: tuple[str, ...]) -> None:
    """A group with these keys, of which some are needed."""
    _group(group, where)
    for key in group:
        if key not in names:
            meant = FORMER.get(key, "") if names is TASK else ""
            hint = f"; it is called {meant} now" if meant else suggestion(str(key), names, where, {})
            raise ValueError(f"{where} has no option {key!r}{hint}")
    for key in needed:
        if key not in group:
            raise ValueError(f"{where} has no {key}: it needs {', '.join(needed)}")


def _group(value: Any, where: str, form: str = "a group") -> None:
    """Raises ValueError unless a value is a group."""
    if not isinstance(value, Mapping | ConfigDict):
        raise ValueError(f"the config has {where}={value!r}; it must be {form}")
