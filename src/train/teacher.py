"""The parameters that a run began with, kept where an objective holds the network to them (`objectives/distill.py`).

They lie in `state.extra["teacher"]`, placed like the parameters and saved with every checkpoint, so that a resumed run
needs no other file. Only what the taught fields' tokens pass through is kept, and of that only what is trained: what
is frozen is the student's. With adapters on the trunk the teacher costs next to nothing.
"""

from __future__ import annotations

import jax.numpy as jnp

from src.common import tree
from src.interfaces import PyTree, row_of
from src.models import mixture_of_transformers as mot
from src.train.state import Keep
from src.train.system import System
from src.train.trainable import rates

OTHERS = (mot.PREFIX, "trunk/layers/modulation/")  # of the trunk, what only tokens with a time pass through
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def keeper(system: System) -> Keep | None:
    """What the teacher of this system keeps of the parameters; None when no objective needs one.

    Raises ValueError for an unknown `config.teacher.dtype`, and when called, where nothing is left to keep.
    """
    name = system.config.get("teacher", {"dtype": "float32"})["dtype"]
    if name not in DTYPES:
        raise ValueError(f"teacher.dtype={name!r} is unknown; use one of {', '.join(DTYPES)}")
    objectives = [objective for plan in system.tasks.values() for objective, _ in plan.objectives.values()]
    taught = {row_of(n) for o in objectives if getattr(o, "taught", False) for n in o.names}
    if not taught:
        return None
    parts = ("trunk/", *(f"fields/{row}/" for row in sorted(taught)))

    def keep(params: PyTree) -> PyTree:
        flat = tree.flatten(params)
        shares = rates(system.config, flat)
        kept = [p for p in flat if p.startswith(parts) and not p.startswith(OTHERS) and shares[p]]
        if not kept:
            raise ValueError(
                "distillation has no trainable parameters: all that its fields pass through is frozen; take the"
                " objective distill out, or see optim.lr_multipliers"
            )
        return tree.unflatten({path: jnp.array(flat[path], DTYPES[name]) for path in kept})

    return keep
