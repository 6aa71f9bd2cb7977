"""Golden values of published systems, `tests/golden/family/<system>/<file>.npz` (what each array means: its README)."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

FOLDER = Path(__file__).parents[1] / "golden" / "family"


def golden(name):
    """The arrays of a file by name."""
    return dict(np.load(FOLDER / f"{name}.npz"))


def fixed_logits(arrays, ids, classes=None):
    """What stands for a network there: base[n] + sum over m of mix[n, m] emb[ids[b, m]], its first classes."""
    logits = arrays["base"] + np.einsum("nm,bmk->bnk", arrays["mix"], arrays["emb"][ids])
    return jnp.asarray(logits[..., :classes], jnp.float32)
