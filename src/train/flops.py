"""How many floating-point operations a train step needs, counted from the model and not from the compiled program.

1. A matrix of N weights that acts on T vectors costs 2 N T operations forward and 4 N T backward: 6 N T (Kaplan et al.
   2020, section 2.1), of a frozen one 4 N T, since it has no gradient of its own. Biases, norms, look-ups, softmax and
   the optimizer are left out, as is usual, and so is what a teacher computes.
2. What a matrix acts on follows from its place: the trunk on every token of every row, an embedder on the tokens of its
   field, a head on those tokens of its field that an objective owns (times the draws of its loss), the layers that read
   the time on one vector for each row, or for each part or token that has a time of its own. A parameter below a name
   without a rule is refused.
3. Attention: a query that sees a key costs 2 h operations for the score and 2 h for the value, per head of size h.
   With A visible pairs a row that is 4 A H h forward and 12 A H h in all, per layer. A follows from the layout without
   padding, so what a dense kernel computes under the mask does not count.
4. Self-conditioning is one more forward pass: 2 N T.

Recomputation (`remat`) does not count either: these are the operations of the model, not of the program.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from src.common.mesh.peaks import bf16_peak
from src.common.tree import flatten
from src.interfaces import Layout, SequenceSpec, row_of
from src.models import lora
from src.models import mixture_of_transformers as mot
from src.models.model import COPIES
from src.sequence.mask import visible
from src.train.metrics import noised_parts
from src.train.system import System, TaskPlan
from src.train.trainable import multipliers

# What the matrices below a path act on, by the names of `acting_counts`; the first match wins. \1 is the field.
RULES = (
    (r"^trunk/.*modulation/", "vectors"),
    (rf"^{mot.PREFIX}", "own"),
    (r"^trunk/", "tokens"),
    (r"^(?:time|conditioning)/", "vectors"),
    (r"/table/", "nothing"),
    (r"^fields/([^/]+)/embed/", r"\1/embed"),
    (r"^fields/([^/]+)/hint/", r"\1/hint"),
    (r"^fields/([^/]+)/head/adaln/", r"\1/head vectors"),
    (r"^fields/([^/]+)/head/state/", r"\1/head states"),
    (r"^fields/([^/]+)/head/", r"\1/head"),
)


def acting_counts(system: System, plans: Mapping[str, TaskPlan] | None = None) -> Counter[str]:
    """Vectors that the parts of the model act on in one step, of all tasks or of some.

    tokens                of all rows, padding included; own, shared: those that have parts of the trunk of their own,
                          and the others
    vectors               conditioning vectors: one for each part of a row, or for each token with a time of its own
    <row>/embed, /hint    tokens of a field, of both copies where there are two; those that see a first estimate
    <row>/head            tokens that an objective owns, once for each draw of the head's loss; `head states`: once;
                          `head vectors`: the vectors that modulate them
    """
    counts: Counter[str] = Counter(nothing=0)
    for plan in (system.tasks if plans is None else plans).values():
        counts["tokens"] += plan.rows * plan.layout.length
        for segment in plan.layout.segments:
            parts = plan.rows * plan.layout.parts_of(segment.name)
            size, copies = parts * segment.length, len(COPIES[segment.role])
            times = parts if _one_time(plan, segment.names) else size
            noised = any(system.fields[row_of(name)].process is not None for name in segment.names)
            if noised:
                counts["vectors"] += times + (copies - 1) * parts  # a clean copy has one time
            elif segment.lead:
                counts["vectors"] += parts
            if system.config.model.trunk.mot and row_of(segment.name) in system.architecture.own:
                counts["own"] += size * copies + parts * segment.lead
            for name in segment.names:
                row = row_of(name)
                owners = [objective for objective, _ in plan.objectives.values() if name in objective.names]
                draws = _draws(system, row)
                counts[f"{row}/embed"] += size * copies
                counts[f"{row}/hint"] += size * any(getattr(o, "hint", 0) for o in owners)
                counts[f"{row}/head"] += size * draws * len(owners)
                counts[f"{row}/head states"] += size * len(owners)
                inner = draws * size  # of a head that has a process of its own
                counts[f"{row}/head vectors"] += (times if noised else inner) * len(owners)
        for row in plan.task.element_spec(plan.rows).cond:
            counts[f"{row}/embed"] += plan.rows
    counts["shared"] = counts["tokens"] - counts["own"]
    return counts


def images(system: System) -> int:
    """Parts of the rows of a step whose field has a process: images, mostly."""
    return sum(plan.rows * noised_parts(system, plan) for plan in system.tasks.values())


def _one_time(plan: TaskPlan, names: tuple[str, ...]) -> bool:
    """Whether all tokens of a segment have one time, in each part."""
    objectives = [objective for objective, _ in plan.objectives.values() if set(names) & set(objective.names)]
    return not any(getattr(o, "per", "row") != "row" or getattr(o, "given", False) for o in objectives)


def _draws(system: System, row: str) -> int:
    """How often the loss of a head goes through its network for one token."""
    noise = system.fields[row].noise
    if noise is None or system.fields[row].process is not None:
        return 1
    drawn = jax.eval_shape(lambda: noise(jax.random.key(0), (1, 1)))
    return max((leaf.shape[1] for leaf in jax.tree.leaves(drawn)), default=1)


def visible_pairs(layout: Layout, window: int = 0) -> int:
    """(query, key) pairs of one row without padding that the visibility rule allows, with the trunk's window."""
    read, write, group = layout.static_orders()
    ones = np.ones(layout.length, np.int32)
    spec = SequenceSpec(read, write, group, ones, np.arange(layout.length)[:, None], window=window)
    return int(np.asarray(visible(spec, spec)).sum())


def step_flops(system: System) -> dict[str, int]:
    """Operations of one train step on all devices: 6 N T by part of the model (of a field `image/head`), `attention`,
    and their sum `total`.

    Raises ValueError for a matrix whose place is not known.
    """
    twice = {}
    for name, plan in system.tasks.items():
        hinted = {label: pair for label, pair in plan.objectives.items() if getattr(pair[0], "hint", 0)}
        twice |= {name: dataclasses.replace(plan, objectives=hinted)} if hinted else {}
    counts, again = acting_counts(system), acting_counts(system, twice)
    matrices: Counter[str] = Counter()
    leaves = flatten(jax.eval_shape(system.init, jax.random.key(0)))
    trained = multipliers(system.config, leaves)
    own = {_layer(mot.original(path)) for path in leaves if mot.is_copy(path)}
    for path, leaf in leaves.items():
        if leaf.ndim < 2 or not path.endswith(("kernel", "embedding", lora.A, lora.B)):
            continue
        what = _tied(path, system) or ("shared" if _layer(path) in own else acts_on(path))
        first, *names = path.split("/")
        part = "/".join(names[:2]) if first == "fields" else first
        acting = (6 if trained[path] else 4) * counts[what] + 2 * again[what]
        matrices[part] += int(np.prod(leaf.shape)) * acting
    attention = attention_flops(system) + attention_flops(system, twice) // 3
    found = {part: value for part, value in matrices.items() if value}
    return found | {"attention": attention, "total": sum(found.values()) + attention}


def seconds_at_peak(system: System, mesh: jax.sharding.Mesh, dtype: Any) -> float | None:
    """Seconds of one train step at the published peak of the mesh's devices, for an `mfu`; None where there is none
    (`common/mesh/peaks.py`), for a computation that is not in bfloat16, and for matrices whose place is not known."""
    peak = bf16_peak(mesh.devices.flat[0].device_kind)
    if peak is None or dtype != jnp.bfloat16:
        return None
    try:
        return step_flops(system)["total"] / (peak * mesh.size)
    except ValueError as error:
        logging.info("mfu is not logged: %s", error)
        return None


def acts_on(path: str) -> str:
    """What of `acting_counts` a matrix acts on. Raises ValueError for one whose place is not known."""
    for pattern, what in RULES:
        if match := re.search(pattern, path):
            return match.expand(what)
    raise ValueError(f"nothing says what {path} acts on; add a rule to src/train/flops.py")


def _tied(path: str, system: System) -> str:
    """What the table of a tied head acts on; nothing for any other parameter."""
    first, row, *rest = path.split("/")
    tied = first == "fields" and rest == ["embed", "table", "embedding"] and system.config.fields[row].get("head")
    return f"{row}/head" if tied and tied.get("tied", False) else ""


def _layer(path: str) -> str:
    """The path of the layer that a parameter belongs to."""
    return path.rpartition("/")[0]


def attention_flops(system: System, plans: Mapping[str, TaskPlan] | None = None, masked: bool = True) -> int:
    """Operations of attention in one train step, of all tasks or of some; not `masked` is what a dense kernel
    computes."""
    trunk, pairs = system.config.model.trunk, 0
    window = trunk.get("sliding_window", 0)
    for plan in (system.tasks if plans is None else plans).values():
        pairs += plan.rows * (visible_pairs(plan.layout, window) if masked else plan.layout.length**2)
    return 12 * pairs * trunk.heads * (trunk.get("head_dim") or trunk.width // trunk.heads) * trunk.depth


def compiled_flops(compiled: Any) -> float | None:
    """What XLA counts for the compiled step; it counts the body of a loop once, so scanned layers are one layer."""
    try:
        analysis = compiled.cost_analysis()
    except (NotImplementedError, jax.errors.JaxRuntimeError):
        return None
    analysis = analysis[0] if isinstance(analysis, list) else analysis
    return float(analysis["flops"]) if analysis and "flops" in analysis else None
