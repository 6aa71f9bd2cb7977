"""Runs of the debug configs in the tests: their configs, what they lost and logged, and comparing trees."""

import json

import jax
import numpy as np

from configs import digits
from src.common.tree import flatten
from src.train.metrics import CLOCK


def config_of(module=digits, variant="debug", **changes):
    config = module.get_config(variant)
    with config.unlocked():
        config.eval.evaluators = {}
        config.log.every = 1
        config.mesh.data = 1
        config.update_from_flattened_dict(changes)
    return config


class Recorder:
    """A writer that keeps the losses, and stops a run where it is told step `last`."""

    def __init__(self, last=None):
        self.losses, self.last = {}, last

    def write_scalars(self, step, scalars):
        self.losses[step] = {k: v for k, v in scalars.items() if k.startswith("loss") or k == "grad_norm"}
        if step == self.last:
            raise KeyboardInterrupt


def logged(folder):
    """The lines of a run without what the clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("time", *CLOCK)} for line in lines]


def close(a, b, **tolerance):
    for (path, x), y in zip(flatten(a).items(), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, err_msg=path, **tolerance)
