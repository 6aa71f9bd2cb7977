"""Numbers of a config that are too small to mean anything are refused before anything is built."""

from __future__ import annotations

from typing import Any

# Dotted names; `*` stands for every group there. What a group may leave out is in OPTIONAL.
AT_LEAST_ONE = (
    "steps",
    "batch",
    "accumulate",
    "guard.patience",
    "log.every",
    "sample.batch_size",
    "decode.*.steps",
    "decode.*.max_new_tokens",
)
AT_LEAST_ZERO = (
    "seed",
    "optim.lr",
    "optim.warmup",
    "optim.steps",
    "optim.grad_clip",
    "eval.every",
    "checkpoint.every",
    "guard.spike",
    "guard.restores",
    "guidance.features",
    "data.workers",
    "data.max_bad.share",
    "data.max_bad.least",
    "doctor.every",
    "doctor.panels",
    "doctor.batches",
    "doctor.drawings",
)
OPTIONAL = ("decode.*.steps", "decode.*.max_new_tokens")  # each decoder has its own options
NONE = ("optim.grad_clip",)  # None: no clipping
SEED_BELOW = 2**32


def check_numbers(config: Any) -> None:
    """Raises ValueError, with the dotted name and the value, for a number that is missing or too small."""
    for names, least in ((AT_LEAST_ONE, 1), (AT_LEAST_ZERO, 0)):
        for name in names:
            for path, value in _find(config, name):
                if value is None and name in NONE:
                    continue
                if not isinstance(value, int | float):
                    raise ValueError(f"the config has {path}={value!r}; it must be a number")
                if not value >= least:
                    raise ValueError(f"the config has {path}={value}; it must be at least {least}")
    if config["seed"] >= SEED_BELOW:
        raise ValueError(f"the config has seed={config['seed']}; it must be below 2^32")


def _find(config: Any, name: str) -> list[tuple[str, Any]]:
    """Every (dotted path, value) that a dotted name stands for."""
    found: list[tuple[str, Any]] = [("", config)]
    for part in name.split("."):
        deeper = []
        for path, group in found:
            for key in group if part == "*" else [part]:
                where = f"{path}.{key}" if path else key
                if key in group:
                    deeper.append((where, group[key]))
                elif name not in OPTIONAL:
                    raise ValueError(f"the config has no {where}; add it, as in configs/common.py")
        found = deeper
    return found
