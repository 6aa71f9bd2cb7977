"""The averages of the parameters that a run keeps, which of them is used, and how much is still initial values.

`config.ema`: the average of `decay` is `state.ema`. Further ones are in `state.extra["averages"]`, by `name_of`: those
of the decays `more`, and those of the widths `power` (`power_average.py`). Each takes the memory of the parameters.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
from absl import logging
from jaxtyping import Array, Int

from src.common.mesh.distributed import is_first
from src.common.tree import listed
from src.interfaces import PyTree
from src.train.optim import ema_update
from src.train.power_average import exponent_of, power_weight

LIMIT = 0.05
AVERAGES = "averages"  # of the state's `extra`


def name_of(kind: str, value: float) -> str:
    """The name of a further average: of the decay 0.999 `decay_0_999`, of the width 0.1 `width_0_1`."""
    return f"{kind}_{float(value)!r}".replace(".", "_").replace("-", "m")


def further(ema: Any) -> dict[str, tuple[str, float]]:
    """The further averages of `config.ema` by name: their kind, decay or width, and its value.

    Raises ValueError for a decay outside of 0 … 1, a width out of range, and for one that is there twice.
    """
    kinds = (("decay", tuple(ema.get("more", ()))), ("width", tuple(ema.get("power", ()))))
    found: dict[str, tuple[str, float]] = {}
    for kind, values in kinds:
        for value in values:
            key = "more" if kind == "decay" else "power"
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
                raise ValueError(f"ema.{key} has {value!r}: give numbers between 0 and 1")
            if kind == "width":
                try:
                    exponent_of(float(value))
                except ValueError as error:
                    raise ValueError(f"ema.power: {error}") from None
            if name_of(kind, value) in found or (kind == "decay" and value == ema["decay"]):
                raise ValueError(f"ema.{key} has {value}, which is there already: remove it")
            found[name_of(kind, value)] = kind, float(value)
    return found


def update_further(averages: Mapping[str, PyTree], params: PyTree, ema: Any, step: Int[Array, ""]) -> dict[str, PyTree]:
    """The further averages after a step; `step` counts from 0."""
    new = {}
    for name, (kind, value) in further(ema).items():
        if kind == "decay":
            new[name] = ema_update(averages[name], params, value, step, warmup=ema.warmup)
        else:
            weight = power_weight(exponent_of(value), step)
            mix = lambda e, p, weight=weight: (e + weight * (p.astype(e.dtype) - e)).astype(e.dtype)
            new[name] = jax.tree.map(mix, averages[name], params)
    return new


def chosen(config: Any) -> tuple[str, float] | None:
    """The average that `config.eval` names besides `ema`: its kind and value, None for that of `ema.decay`.

    Raises ValueError where `eval.decay` and `eval.width` are both given.
    """
    decay, width = (float(config.eval.get(name, 0.0)) for name in ("decay", "width"))
    if decay and width:
        raise ValueError(f"eval.decay={decay} and eval.width={width} name two averages: give one of them")
    if decay == float(config.ema["decay"]):
        return None
    return ("decay", decay) if decay else ("width", width) if width else None


def check_chosen(config: Any, afterwards: bool = False) -> None:
    """Raises ValueError, in one sentence, unless the run keeps the average that `config.eval` names.

    afterwards   any width will do, which is made of those that checkpoints keep (`posthoc.py`)
    """
    kept, wanted = further(config.ema), chosen(config)
    if wanted is None or not config.eval.ema or name_of(*wanted) in kept:
        return
    kind, value = wanted
    if kind == "width" and afterwards:
        return
    have = [str(number) for each, number in kept.values() if each == kind]
    have += [str(config.ema["decay"])] if kind == "decay" else []
    more = "" if kind == "decay" else "; others are made from checkpoints, by --mode=eval, sample and the tools"
    raise ValueError(f"eval.{kind}={value}: the run keeps the averages of {kind} {listed(have) or 'none'}{more}")


def initial_share(decay: float, warmup: bool, steps: int) -> float:
    """The weight of the initial parameters in the average after `steps` calls of `optim.ema_update`.

    Without warm-up decay^n. With it step i has the decay (1 + i) / (10 + i) until that reaches `decay`, which is
    product (1 + i) / (10 + i) = 9! m! / (9 + m)! over the first m steps, and decay^(n - m) after them.
    """
    rising = 0
    if warmup:
        reached = (10 * decay - 1) / (1 - decay) if decay < 1 else math.inf  # (1 + i) / (10 + i) <= decay up to this i
        rising = min(steps, max(0, math.floor(reached) + 1)) if reached < steps else steps
    share = math.lgamma(10) + math.lgamma(rising + 1) - math.lgamma(rising + 10)
    rest = steps - rising
    return math.exp(share) * (decay**rest if rest else 1.0)


def used_params(state: Any, config: Any) -> Any:
    """The parameters that are sampled and measured, `config.eval`: the last ones, or an average, with the warning of
    `check_average`. Raises ValueError where the state has not the average that is named."""
    if not config.eval.ema:
        return state.params
    wanted = chosen(config)
    if wanted is not None and wanted[0] == "width":
        name = name_of(*wanted)
        if name not in state.extra.get(AVERAGES, {}):
            check_chosen(config)
        return state.extra[AVERAGES][name]
    skipped = state.extra.get("guard", {}).get("skipped", 0)
    ema = {"decay": wanted[1] if wanted else config.ema["decay"], "warmup": config.ema["warmup"]}
    check_average(ema, int(state.step) - int(skipped))
    if wanted is None:
        return state.ema
    check_chosen(config)
    return state.extra[AVERAGES][name_of(*wanted)]


def check_average(ema: Any, step: int, use: str = "what is made and measured with it") -> float:
    """The share of initial values in the average of a run after `step` steps; above `LIMIT` a warning says so.

    ema   the group of the config; `use` what the average is used for
    """
    share = initial_share(ema["decay"], bool(ema["warmup"]), step)
    if step > 0 and share > LIMIT and is_first():
        _warn(ema["decay"], bool(ema["warmup"]), step, use)
    return share


@functools.lru_cache(1)  # evaluators and panels of one step say it once
def _warn(decay: float, warmup: bool, step: int, use: str) -> None:
    share = initial_share(decay, warmup, step)
    ways = "train longer" if warmup else "take ema.warmup=True in a new run"
    logging.warning(
        "the moving average after %d steps is %.0f %% initial weights (ema.decay=%s, warmup=%s), and %s shows mostly"
        " those: %s, a smaller ema.decay, or the last weights (eval.ema=False, or an export without --ema)",
        step, 100 * share, decay, warmup, use, ways,
    )  # fmt: skip
