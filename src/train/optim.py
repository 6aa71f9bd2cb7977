"""AdamW with rules by parameter path, Adafactor, Muon, schedules, and the moving average of the parameters.

Kingma & Ba 2015 (Adam), Loshchilov & Hutter 2019 (decoupled weight decay). With g the clipped gradient, k = step + 1:
m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g²,  u = (m / (1 - b1^k)) / (sqrt(v / (1 - b2^k)) + eps),
w = w - lr(step) · multiplier(path) · (u + decay(path) w).

`moments`: the optimizer state of a matrix of n x k weights (in a stack of layers, of each matrix):

  full       m and v in f32: 8 bytes per weight
  bfloat16   m in bfloat16, v in f32: 6 bytes per weight
  factored   m in bfloat16 and, in place of v, its n row means and k column means in f32: 2 bytes per weight

The last is Adafactor (Shazeer & Stern 2018, arXiv 1804.04235) with momentum, as in Zhai et al. 2022 (arXiv 2106.04560):
V = rows ⊗ columns / mean(rows) with decay min(b2, 1 - k^-0.8), u = g / sqrt(V), scaled down to a root mean square of at
most 1 in each parameter, then m = b1 m + (1 - b1) u in place of u. Only parameters with two axes of at least 128 are
factored, the others keep v; b1 = 0 keeps no m; `eps` is not used. The learning rate is not relative to the weights.

`method` muon has another u for the matrices of the trunk (`train/muon.py`). They keep a momentum alone, in the dtype of
m; `moments` is for the other parameters.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from src.common import lookup, tree
from src.train.muon import MuonConfig, matrices, scale_matrices

Schedule = Callable[[Any], Any]
Rules = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """Options of `build_optimizer`; durations are optimizer steps.

    lr              peak learning rate
    schedule        constant | cosine | linear: from the peak to `final` · peak between steps `warmup` and `steps`
    warmup          steps of a linear rise; step i has (i + 1) / warmup of the peak, so that step 0 is not lost
    steps           end of the schedule (not of the run), for cosine and linear
    weight_decay    a number for all parameters, or rules (regex, number); the first match wins
    decays          rules before those of `weight_decay`
    lr_multipliers  rules (regex, number) on the learning rate; 0 freezes: no update, no moments, not in the norm
    method          adamw | muon
    moments         full | bfloat16 | factored (docstring of the module)
    muon            options of `method` muon
    grad_clip       largest global norm of the gradient, which is scaled down to it; None: no clipping
    """

    lr: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    steps: int = 0
    final: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    weight_decay: float | Rules = 0.0
    decays: Rules = ()
    lr_multipliers: Rules = ((".*", 1.0),)
    grad_clip: float | None = None
    moments: str = "full"
    method: str = "adamw"
    muon: MuonConfig = dataclasses.field(default_factory=MuonConfig)


def _factored(config: OptimConfig) -> optax.GradientTransformation:
    decay = lambda step, power: jnp.minimum(config.b2, 1 - (jnp.asarray(step, jnp.float32) + 1) ** -power)
    steps = [optax.scale_by_factored_rms(decay_rate_fn=decay), optax.clip_by_block_rms(1.0)]
    momentum = [optax.ema(config.b1, debias=False, accumulator_dtype=jnp.bfloat16)] if config.b1 else []
    return optax.chain(*steps, *momentum)


MOMENTS: dict[str, Callable[[OptimConfig], optax.GradientTransformation]] = {
    "full": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.float32),
    "bfloat16": lambda c: optax.scale_by_adam(c.b1, c.b2, c.eps, mu_dtype=jnp.bfloat16),
    "factored": _factored,
}


METHODS = ("adamw", "muon")
MOMENTUM = {"full": jnp.float32}  # dtype of Muon's, by `moments`; bfloat16 for the others

# (share of the decay that is done, from 0 to 1; `final`) -> fraction of the peak
DECAYS: dict[str, Callable[[Any, float], Any]] = {
    "constant": lambda done, final: 1.0 + 0.0 * done,
    "cosine": lambda done, final: final + (1 - final) * 0.5 * (1 + jnp.cos(jnp.pi * done)),
    "linear": lambda done, final: 1 - (1 - final) * done,
}


def build_schedule(config: OptimConfig) -> Schedule:
    """step (from 0) -> learning rate, f32. Raises ValueError for an unknown name or durations that do not fit."""
    if config.schedule not in DECAYS:
        raise ValueError(f"optim.schedule {config.schedule!r} is unknown; there are: {', '.join(DECAYS)}")
    if config.warmup < 0 or (config.schedule != "constant" and config.steps <= config.warmup):
        raise ValueError(
            f"optim.schedule {config.schedule!r} needs 0 <= warmup < steps, not warmup={config.warmup} and"
            f" steps={config.steps}: set optim.steps to the step at which the schedule ends, or lower optim.warmup"
        )
    decay, length = DECAYS[config.schedule], max(config.steps - config.warmup, 1)

    def schedule(step: Any) -> Float[Array, ""]:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - config.warmup) / length, 0.0, 1.0)
        rise = jnp.minimum((step + 1) / max(config.warmup, 1), 1.0)
        return config.lr * rise * decay(done, config.final)

    return schedule


def rate_change(old: Any, new: Any, step: int) -> str:
    """One sentence where the learning rate of `step` is another one because a run's `steps` changed, else "".

    old, new   configs with `steps` and `optim`; a schedule without steps of its own ends with the run
    """

    def rate(config: Any) -> float:
        told = {key: config["optim"][key] for key in ("lr", "schedule", "warmup", "steps", "final")}
        told["steps"] = told["steps"] or config["steps"]
        return float(build_schedule(OptimConfig(**told))(step))

    was, now = rate(old), rate(new)
    if old["steps"] == new["steps"] or was == now:
        return ""
    return (
        f"steps changed from {old['steps']} to {new['steps']}, with which the {new['optim']['schedule']} schedule ends:"
        f" the learning rate goes from {was:.4g} to {now:.4g} at step {step}; to keep the schedule, add"
        f" --config.optim.steps={old['optim']['steps'] or old['steps']}"
    )


def build_optimizer(
    config: Mapping[str, Any] | ConfigDict | OptimConfig, shapes: Any
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optimizer of a tree of parameters (only paths and shapes are used), and the schedule for logging.

    Updates are f32 for gradients of any dtype. Raises ValueError for an unknown key or name, a rule that matches no
    parameter first, a parameter without a rule, or when all parameters are frozen.
    """
    config = _parse(config)
    paths = list(tree.flatten(shapes))
    decays = _decays(paths, config)
    multipliers = tree.match_rules(paths, config.lr_multipliers, "optim.lr_multipliers' rules")
    for name, values in (("weight_decay", decays), ("lr_multipliers", multipliers)):
        if min(values.values(), default=0.0) < 0:
            raise ValueError(f"optim.{name} has a negative value; values are 0 or more")
    if paths and not any(multipliers.values()):
        raise ValueError("optim.lr_multipliers freezes every parameter: leave at least one with a value above 0")
    for option, known in (("moments", MOMENTS), ("method", METHODS)):
        if (value := getattr(config, option)) not in known:
            raise ValueError(f"optim.{option} {value!r} is unknown; there are: {', '.join(known)}")
    schedule = build_schedule(config)
    steps = [_by_path(lambda update, _, __: update.astype(jnp.float32), dict.fromkeys(paths))]
    if config.grad_clip is not None:
        steps.append(optax.clip_by_global_norm(config.grad_clip))
    scaled = MOMENTS[config.moments](config)
    if config.method == "muon":
        chosen = matrices(config.muon, tree.flatten(shapes), [path for path in paths if multipliers[path]])
        scaled = scale_matrices(config.muon, chosen, scaled, MOMENTUM.get(config.moments, jnp.bfloat16))
    steps.append(scaled)
    if any(decays.values()):
        steps.append(_by_path(lambda u, w, rate: u + rate * w.astype(jnp.float32) if rate else u, decays))
    if set(multipliers.values()) - {1.0}:
        steps.append(_by_path(lambda u, _, factor: u * factor if factor != 1 else u, multipliers))
    steps.append(optax.scale_by_learning_rate(schedule))
    optimizer = optax.chain(*steps)
    if all(multipliers.values()):
        return optimizer, schedule
    labels = tree.rebuild({path: "train" if multipliers[path] else "frozen" for path in paths}, shapes)
    return optax.partition({"train": optimizer, "frozen": optax.set_to_zero()}, labels), schedule


def _decays(paths: list[str], config: OptimConfig) -> dict[str, float]:
    """The weight decay of each path."""
    decay = config.weight_decay
    decay = ((".*", float(decay)),) if isinstance(decay, int | float) else decay
    try:
        own = [path for path in paths if any(re.search(pattern, path) for pattern, _ in config.decays)]
    except re.error as error:
        raise ValueError(f"optim.decays has a rule that is no regular expression ({error}): correct it") from error
    decays = tree.match_rules(own, config.decays, "optim.decays' rules") if config.decays else {}
    rest = [path for path in paths if path not in decays]
    return decays | (tree.match_rules(rest, decay, "optim.weight_decay's rules") if rest else {})


def ema_update(ema: Any, params: Any, decay: float, step: Int[Array, ""] | int, warmup: bool = False) -> Any:
    """d · ema + (1 - d) · params, leaf by leaf, in the dtype of `ema`.

    d is `decay`, or with warm-up min(decay, (1 + step) / (10 + step)), for less weight of the initial values (as in
    TensorFlow's ExponentialMovingAverage). `step` counts from 0.
    """
    # 1 - d is computed in float64: in f32, 1 - 0.9999 has a relative error of 6e-4.
    weight = 1.0 - decay
    if warmup:
        weight = jnp.maximum(weight, 9.0 / (10.0 + jnp.asarray(step, jnp.float32)))
    return jax.tree.map(lambda e, p: (e + weight * (p.astype(e.dtype) - e)).astype(e.dtype), ema, params)


def _parse(config: Mapping[str, Any] | ConfigDict | OptimConfig) -> OptimConfig:
    if isinstance(config, OptimConfig):
        return config
    values = {key: config[key] for key in config}
    lookup.check_arguments(OptimConfig, values, where="the config's optim")
    for name in ("weight_decay", "decays", "lr_multipliers"):
        rules = values.get(name, ())
        if name == "weight_decay" and isinstance(rules, int | float):
            continue
        tree.check_rules(rules, f"optim.{name}' rules" if name.endswith("s") else f"optim.{name}'s rules")
        if wrong := [value for _, value in rules if not isinstance(value, int | float)]:
            raise ValueError(f"optim.{name} has the value {wrong[0]!r}; values are numbers")
    if not isinstance(muon := values.get("muon", MuonConfig()), MuonConfig):
        options = {key: muon[key] for key in muon}
        lookup.check_arguments(MuonConfig, options, where="the config's optim.muon")
        lookup.check_kinds(MuonConfig, options, where="the config's optim.muon")
        values["muon"] = MuonConfig(**options)
    return OptimConfig(**values)


def _by_path(function: Callable[[Any, Any, Any], Any], values: Mapping[str, Any]) -> optax.GradientTransformation:
    """update = function(update, parameter, values[path of the parameter]); stateless."""

    def apply(updates: Any, params: Any) -> Any:
        if params is None:
            raise ValueError("the optimizer's update needs the parameters as its third argument")
        return jax.tree_util.tree_map_with_path(
            lambda path, update, param: function(update, param, values[tree.path_string(path)]), updates, params
        )

    return optax.stateless(apply)
