"""How many floating-point operations a train step needs, counted from the model and not from the compiled program.

1. A matrix of N weights that acts on T vectors costs 2 N T operations forward and 4 N T backward: 6 N T (Kaplan et al.
   2020, section 2.1), of a frozen one 4 N T, since it has no gradient of its own. Biases, norms, look-ups, softmax and
   the optimizer are left out, as is usual, and so is what a teacher computes.
2. What a matrix acts on follows from its place: the trunk on every token of every row, the text head on the tokens of
   the fields that a next-token objective owns, the image head on the patches that a denoising objective owns (its adaLN
   on their rows), the time embedding once per image.
3. Attention: a query that sees a key costs 2 h operations for the score and 2 h for the value, per head of size h.
   With A visible pairs a row that is 4 A H h forward and 12 A H h in all, per layer. A follows from the layout without
   padding, so what a dense kernel computes under the mask does not count.

Recomputation (`remat`) does not count either: these are the operations of the model, not of the program.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import numpy as np

from src.common.tree import flatten
from src.interfaces import SequenceSpec
from src.models import lora
from src.models import mixture_of_transformers as mot
from src.sequence.layout import Layout
from src.sequence.mask import visible
from src.train.system import System
from src.train.trainable import rates

# What the matrices below a path act on; the first match wins.
RULES = (
    (r"^trunk/.*modulation/", "vectors"),
    (rf"^{mot.PREFIX}", "shown"),
    (r"^trunk/", "tokens"),
    (r"^time/", "vectors"),
    (r"^conditioning/", "vectors"),
    (r"^image/", "patches"),
    (r"^vision/", "features"),
    (r"^image_head/adaln/", "denoised_images"),
    (r"^image_head/", "denoised_patches"),
    (r"^text_head/", "predicted"),
    (r"/table/", "nothing"),
)


def acting_counts(system: System) -> dict[str, int]:
    """Vectors that the parts of the model act on in one step.

    tokens            of all rows, padding included; shown, written: those of images and their times, and of text
    vectors, patches  images (which have one vector each), and their patches
    features          those of images that are understood
    denoised_images, denoised_patches    those that a denoising objective reads
    predicted         tokens of the text fields that a next-token objective reads
    """
    names = ("tokens", "shown", "written", "vectors", "patches", "features")
    names = (*names, "denoised_images", "denoised_patches", "predicted")
    counts = dict.fromkeys(names, 0)
    for plan in system.tasks.values():
        owned = [name for objective, _ in plan.objectives.values() for name in objective.fields]
        counts["tokens"] += plan.rows * plan.layout.length
        for segment in plan.layout.segments:
            images = plan.rows * plan.layout.copies(segment.name)
            size = images * segment.length
            counts["shown"] += size if segment.kind != "text" else 0
            if segment.kind == "image":
                counts["vectors"] += images
                counts["patches"] += size
                counts["denoised_images"] += images * owned.count(segment.name)
                counts["denoised_patches"] += size * owned.count(segment.name)
            elif segment.kind == "vision":
                counts["features"] += size
            elif segment.kind == "text":
                counts["predicted"] += size * owned.count(segment.name)
    counts["written"] = counts["tokens"] - counts["shown"]
    return counts | {"nothing": 0}


def visible_pairs(layout: Layout) -> int:
    """(query, key) pairs of one row without padding that the visibility rule allows."""
    read, write, group = layout.static_orders()
    ones = np.ones(layout.length, np.int32)
    spec = SequenceSpec(read, write, group, ones, np.arange(layout.length)[:, None])
    return int(np.asarray(visible(spec, spec)).sum())


def step_flops(system: System) -> dict[str, int]:
    """Operations of one train step on all devices: 6 N T by part of the model, `attention`, and their sum `total`.

    Raises ValueError for a matrix whose place is not known.
    """
    counts = acting_counts(system)
    matrices: dict[str, int] = {}
    leaves = flatten(jax.eval_shape(system.init, jax.random.key(0)))
    trained = rates(system.config, leaves)
    copied = {_layer(mot.original(path)) for path in leaves if mot.is_copy(path)}
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or not path.endswith(("kernel", "embedding", lora.A, lora.B)):
            continue
        what = next((what for pattern, what in RULES if re.search(pattern, path)), None)
        what = "written" if _layer(path) in copied else what
        if what is None:
            raise ValueError(f"nothing says what {path} acts on; add a rule to src/tools/compile/flops.py")
        part = path.split("/")[0]
        each = 6 if trained[path] else 4
        matrices[part] = matrices.get(part, 0) + each * int(np.prod(leaf.shape)) * counts[what]
    attention = attention_flops(system)
    matrices = {part: value for part, value in matrices.items() if value}
    return matrices | {"attention": attention, "total": sum(matrices.values()) + attention}


def _layer(path: str) -> str:
    """The path of the layer that a parameter belongs to."""
    return path.rpartition("/")[0]


def attention_flops(system: System, masked: bool = True) -> int:
    """Operations of attention in one train step; not `masked` is what a dense kernel computes."""
    trunk = system.config.model.trunk
    pairs = sum(
        plan.rows * (visible_pairs(plan.layout) if masked else plan.layout.length**2) for plan in system.tasks.values()
    )
    return 12 * pairs * trunk.width * trunk.depth


def compiled_flops(compiled: Any) -> float | None:
    """What XLA counts for the compiled step; it counts the body of a loop once, so scanned layers are one layer."""
    try:
        analysis = compiled.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis["flops"]) if analysis and "flops" in analysis else None
