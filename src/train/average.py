"""How much of a moving average of the parameters is still their initial values."""

from __future__ import annotations

import functools
import math
from typing import Any

from absl import logging

from src.common.mesh.distributed import is_first

LIMIT = 0.05


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
    """The parameters that are sampled and measured, `eval.ema`: the average, with the warning of `check_average`."""
    if not config.eval.ema:
        return state.params
    skipped = state.extra.get("guard", {}).get("skipped", 0)
    check_average(config.ema, int(state.step) - int(skipped))
    return state.ema


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
