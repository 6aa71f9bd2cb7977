"""Which parameters are trained, and at which share of the learning rate."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from src.common import tree
from src.interfaces import PyTree
from src.models import lora

WHAT = "optim.lr_multipliers' rules"


def multipliers(config: Any) -> tuple[tuple[str, float], ...]:
    """`optim.lr_multipliers`, after the rule by which adapters (`model.lora`) freeze what they stand in for."""
    return (*lora.frozen(config.get("model", {}).get("lora", {}).get("rank", 0)), *config.optim.lr_multipliers)


def rates(config: Any, paths: Iterable[str]) -> dict[str, float]:
    """The multiplier of each parameter, by path; 0 freezes. Raises ValueError as `tree.match_rules` does."""
    return tree.match_rules(paths, multipliers(config), WHAT)


def split(params: PyTree, config: Any) -> tuple[PyTree, PyTree]:
    """(what is trained, what is frozen), two parts of one nested dict; `tree.joined` puts them together."""
    flat = tree.flatten(params)
    shares = rates(config, flat)
    if all(shares.values()):
        return params, {}
    trained, frozen = ({p: x for p, x in flat.items() if bool(shares[p]) == which} for which in (True, False))
    return tree.unflatten(trained), tree.unflatten(frozen)
