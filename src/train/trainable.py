"""Learning rate multipliers of the parameters, and the split into trained and frozen ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from src.common import tree
from src.interfaces import PyTree
from src.models import lora

WHAT = "optim.lr_multipliers' rules"


def multiplier_rules(config: Any) -> tuple[tuple[str, float], ...]:
    """The rules of `optim.lr_multipliers`, after those that freeze the kernels with adapters (`model.lora`)."""
    return (*lora.frozen(config.get("model", {}).get("lora", {}).get("rank", 0)), *config.optim.lr_multipliers)


def multipliers(config: Any, paths: Iterable[str]) -> dict[str, float]:
    """The multiplier of each parameter, by path; 0 freezes. Raises ValueError as `tree.match_rules` does."""
    return tree.match_rules(paths, multiplier_rules(config), WHAT)


def split(params: PyTree, config: Any) -> tuple[PyTree, PyTree]:
    """(trained, frozen) parameters, two parts of one nested dict; `tree.joined` is the inverse."""
    flat = tree.flatten(params)
    shares = multipliers(config, flat)
    if all(shares.values()):
        return params, {}
    trained, frozen = ({p: x for p, x in flat.items() if bool(shares[p]) == which} for which in (True, False))
    return tree.unflatten(trained), tree.unflatten(frozen)
