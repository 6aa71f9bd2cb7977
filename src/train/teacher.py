"""The teacher of distillation (`objectives/distill.py`): a copy of the initial parameters.

It is `state.extra["teacher"]`, sharded like the parameters and saved with every checkpoint, so that a resumed run needs
no other file. Only trainable parameters that tokens of the distilled fields pass through are copied; frozen ones are
shared with the student, so with adapters on the trunk the teacher is small.
"""

from __future__ import annotations

import jax.numpy as jnp

from src.common import tree
from src.interfaces import PyTree, row_of
from src.models import mixture_of_transformers as mot
from src.train.state import TeacherSelector
from src.train.system import System
from src.train.trainable import multipliers

OTHERS = (mot.PREFIX, "trunk/layers/modulation/")  # trunk parameters for tokens with a time only
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def teacher_selector(system: System) -> TeacherSelector | None:
    """The function parameters -> teacher's parameters; None if no objective has a teacher.

    Raises ValueError for an unknown `config.teacher.dtype`; the function does so if it would select no parameters.
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
        shares = multipliers(system.config, flat)
        kept = [p for p in flat if p.startswith(parts) and not p.startswith(OTHERS) and shares[p]]
        if not kept:
            raise ValueError(
                "distillation has no trainable parameters, since all that its fields use is frozen: remove the"
                " objective distill, or change optim.lr_multipliers"
            )
        return tree.unflatten({path: jnp.array(flat[path], DTYPES[name]) for path in kept})

    return keep
