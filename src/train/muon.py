"""Muon for the matrices of the trunk, through optax: a momentum whose singular values are all made about 1.

Jordan 2024 (Muon); scale and weight decay as in Liu et al. 2025 (arXiv 2502.16982). With G the clipped gradient of a
matrix of n x k weights, b the momentum and i = step + 1:

    M = b M + (1 - b) G,   H = b M / (1 - b^(i+1)) + (1 - b) G / (1 - b^i)      (Nesterov)
    U = rms · sqrt(max(n, k)) · NS(H / |H|)

NS are `steps` Newton-Schulz steps X -> 3.4445 X - 4.7750 (X Xᵀ) X + 2.0315 (X Xᵀ)² X: they keep the singular vectors
and bring the singular values to between about 0.7 and 1.2. The factor gives an update the root mean square `rms` for
any shape of the matrix; 0.2 is about that of AdamW's, so that one learning rate and one weight decay serve both. U
stands in place of AdamW's u in `train/optim.py`; decay, multipliers, schedule and clipping are the same.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import optax
from optax import contrib

from src.common import tree
from src.models.model import STACKED

MATRICES = "trunk/layers/(mot/)?(attention/(q|k|v|out)|mlp/(gate|up|down))/kernel"


@dataclass(frozen=True)
class MuonConfig:
    """Options of `scale_matrices`, `optim.muon` of a config.

    targets   regex for the whole path of a parameter; its last two axes are the matrix, axes before them (layers) are
              separate matrices. Embeddings, heads, norms, conditioning and biases are meant for AdamW
    momentum  b above
    steps     of Newton-Schulz
    rms       root mean square of an update before the learning rate
    """

    targets: str = MATRICES
    momentum: float = 0.95
    steps: int = 5
    rms: float = 0.2


def matrices(config: MuonConfig, shapes: Mapping[str, Any], trained: Collection[str]) -> frozenset[str]:
    """The paths that Muon updates, of all parameters by path; those that are not `trained` are never updated.

    Raises ValueError for options that mean nothing, targets that are no matrices, or when no target is trained.
    """
    if not (0 <= config.momentum < 1 and config.steps >= 1 and config.rms > 0):
        raise ValueError(
            f"optim.muon has momentum={config.momentum}, steps={config.steps} and rms={config.rms}; momentum is at"
            " least 0 and below 1, steps at least 1, rms above 0"
        )
    try:
        found = frozenset(path for path in shapes if re.fullmatch(config.targets, path))
    except re.error as error:
        raise ValueError(f"optim.muon.targets={config.targets!r} is no regular expression: {error}") from error
    flat = [path for path in shapes if path in found and shapes[path].ndim - path.startswith(STACKED) < 2]
    if flat:
        raise ValueError(f"optim.muon.targets matches {tree.listed(flat)}, no matrices: leave them to AdamW")
    if not found & frozenset(trained):
        raise ValueError(
            f"optim.muon.targets={config.targets!r} matches no trained parameter: correct it, or set"
            " optim.method to 'adamw'"
        )
    return found


def scale_matrices(
    config: MuonConfig, paths: Collection[str], others: optax.GradientTransformation, dtype: Any
) -> optax.GradientTransformation:
    """Updates U of the matrices `paths`, and those that `others` gives of all other parameters.

    dtype   of the momentum, the only state of a matrix
    """

    def axes(updates: Any) -> Any:
        return jax.tree.map(lambda leaf: contrib.MuonDimensionNumbers(leaf.ndim - 2, leaf.ndim - 1), updates)

    def labels(updates: Any) -> Any:
        name = lambda path, _: "muon" if tree.path_string(path) in paths else "others"
        return jax.tree_util.tree_map_with_path(name, updates)

    def sized(updates: Any, _: Any) -> Any:
        return jax.tree.map(lambda leaf: config.rms * math.sqrt(max(leaf.shape[-2:])) * leaf, updates)

    orthogonal = contrib.scale_by_muon(
        ns_steps=config.steps, beta=config.momentum, mu_dtype=dtype, weight_dimension_numbers=axes
    )
    muon = optax.chain(orthogonal, optax.stateless(sized))
    return optax.partition({"muon": muon, "others": others}, labels)
