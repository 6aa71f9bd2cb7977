"""What a train step needs by arithmetic alone: FLOPs of the model, and a rough estimate of its memory."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

import jax

from src.common.tree import count_parameters, flatten
from src.train.system import System

APPLIED = (  # how often a matrix of the model is applied, by path; the first match wins
    (r"^trunk/.*modulation|^image_head/adaln|^time/|^conditioning/", "vectors"),
    (r"^text_head/", "targets"),
    (r"^image", "patches"),
    (r"", "tokens"),
)
STATE = 4 * 4  # bytes a parameter: itself, its average and two moments, in float32


def counts(system: System) -> dict[str, int]:
    """Of one step: `tokens` in the trunk, `patches`, `images`, text `targets`, conditioning `vectors`, `rows`."""
    found = dict.fromkeys(("tokens", "patches", "images", "targets", "vectors", "rows"), 0)
    for plan in system.tasks.values():
        images = plan.layout.named("image")
        fields = [f for objective, _ in plan.objectives.values() for f in objective.fields]
        texts = [plan.layout.segment(f).length for f in fields if plan.layout.segment(f).kind == "text"]
        found["rows"] += plan.rows
        found["tokens"] += plan.rows * plan.layout.length
        found["images"] += plan.rows * len(images)
        found["patches"] += plan.rows * sum(plan.layout.segment(name).length for name in images)
        found["targets"] += plan.rows * sum(texts)
        found["vectors"] += plan.rows * len(images)
    return found


def model_flops(system: System) -> int:
    """Floating point operations that one train step needs on all devices together, nothing computed twice.

    6 · N · T, where a matrix of N elements is applied T times (tables of embeddings never, the text head where there
    are targets, modulations once an image), plus attention, 12 · layers · width · length² a row, unmasked (Chowdhery
    et al. 2022, appendix B).
    """
    shapes = flatten(jax.eval_shape(system.init, jax.random.key(0)))
    matrices = {path: math.prod(leaf.shape) for path, leaf in shapes.items() if path.endswith("kernel")}
    times, trunk = counts(system), system.config.model.trunk
    applied = {path: next(what for rule, what in APPLIED if re.search(rule, path)) for path in matrices}
    products = sum(6 * size * times[applied[path]] for path, size in matrices.items())
    squares = sum(plan.rows * plan.layout.length**2 for plan in system.tasks.values())
    return products + 12 * trunk.depth * trunk.width * squares


def estimate_bytes(system: System, mesh: Mapping[str, int], remat: str, batches: float) -> int:
    """Rough memory of one chip in a train step, good to order candidates.

    State and gradients over `fsdp` (and `tensor`), what the policy `remat` keeps of every layer, and the widest layer.
    `batches`: rows of a microbatch, in batches of the config.
    """
    parameters = count_parameters(jax.eval_shape(system.init, jax.random.key(0)))
    split = mesh.get("fsdp", 1) * mesh.get("tensor", 1)
    devices, c = math.prod(mesh.values()), system.config.model
    size, trunk = (2 if c.dtype == "bfloat16" else 4), c.trunk
    shared = trunk.width * 2 * trunk.kv_heads // trunk.heads
    wide = (2 if trunk.mlp == "swiglu" else 1) * trunk.mlp_width
    length = max(plan.layout.length for plan in system.tasks.values())
    scores = trunk.heads * length * (4 + size)
    matrices = size * (3 * trunk.width + shared + wide)
    kept = {"full": 0, "none": matrices + scores + size * (4 * trunk.width + trunk.mlp_width)}.get(remat, matrices)
    tokens = counts(system)["tokens"] * batches / devices
    activations = tokens * (trunk.depth * (kept + size * trunk.width) + 2 * (matrices + scores))
    whole_layers = 2 * size * parameters / trunk.depth if split > 1 else size * parameters
    return round((STATE + 4) * parameters / split + whole_layers + activations)
