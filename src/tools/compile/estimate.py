"""A rough estimate of the memory of a train step, by arithmetic alone."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from src.common.tree import count_parameters
from src.train.average import further
from src.train.flops import acting_counts
from src.train.system import System

STATE = 4 * 4  # bytes a parameter: itself, its average and two moments, in float32


def estimate_bytes(system: System, mesh: Mapping[str, int], remat: str, batches: float) -> int:
    """Rough memory of one chip in a train step, good to order candidates.

    State and gradients over `fsdp` (and `tensor`), what the policy `remat` keeps of every layer, and the widest layer.
    `batches`: rows of a microbatch, in batches of the config.
    """
    parameters = count_parameters(jax.eval_shape(system.init, jax.random.key(0)))
    split = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    devices, c = math.prod(mesh.values()), system.config.model
    size, trunk = (2 if c.dtype == "bfloat16" else 4), c.trunk
    head = trunk.get("head_dim") or trunk.width // trunk.heads
    shared, asked = 2 * trunk.kv_heads * head, trunk.heads * head
    wide = (2 if trunk.mlp == "swiglu" else 1) * trunk.mlp_width
    length = max(plan.layout.length for plan in system.tasks.values())
    scores = trunk.heads * length * (4 + size)
    matrices = size * (2 * trunk.width + asked + shared + wide)
    # Without recomputation dense attention and everything elementwise keep their float32 intermediates too.
    everything = matrices + (8 + size) * trunk.heads * length + 16 * trunk.width + 8 * trunk.mlp_width
    kept = {"full": 0, "none": everything}.get(remat, matrices)
    tokens = acting_counts(system)["tokens"] * batches / devices
    activations = tokens * (trunk.depth * (kept + size * trunk.width) + 2 * (matrices + scores))
    whole_layers = 2 * size * parameters / trunk.depth if split > 1 else size * parameters
    averages = 4 * len(further(system.config.ema))
    return round((STATE + averages + 4) * parameters / split + whole_layers + activations)
