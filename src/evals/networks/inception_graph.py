"""The FID's Inception from TensorFlow's own file of 2015, `classify_image_graph_def.pb`, as ADM's evaluator runs it.

The graph calls the layers by their place: `mixed`, `mixed_1`, … `mixed_10` are the blocks in order, a branch of one
convolution is `conv`, the others are `tower`, `tower_1`, …, and the convolutions of a branch are `conv`, `conv_1`, ….
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from src.common.files.graph_def import GraphNode, read_graph
from src.common.files.paths import shown
from src.evals.networks.inception import BLOCKS, EPSILON, STEM, Conv

NORMALIZATION = "BatchNormWithGlobalNormalization"
PARTS = {"beta": "bias", "gamma": "weight", "moving_mean": "running_mean", "moving_variance": "running_var"}


def read_inception_graph(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """The tensors of the graph under the names and in the axes of the PyTorch files (`inception.shapes`).

    Raises FileNotFoundError, and ValueError, in one sentence, for a file that is no graph, a graph without these nodes,
    and one whose normalization differs.
    """
    nodes, where = read_graph(path), f"the graph {shown(os.fspath(path))}"
    found: dict[str, np.ndarray] = {}
    missing = []
    for ours, theirs in graph_names():
        wanted = {f"{ours}.conv.weight": f"{theirs}/conv2d_params"}
        wanted |= {f"{ours}.bn.{part}": f"{theirs}/batchnorm/{name}" for name, part in PARTS.items()}
        for name, node in wanted.items():
            value = nodes[node].value if node in nodes else None
            if value is None:
                missing.append(node)
            else:
                found[name] = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value
        if not missing:
            _normalize(nodes, theirs, ours, found, where)
    for name, node in (("fc.weight", "softmax/weights"), ("fc.bias", "softmax/biases")):
        value = nodes[node].value if node in nodes else None
        if value is None:
            missing.append(node)
        else:
            found[name] = value.T
    if missing:
        raise ValueError(
            f"{where} is another network than the FID's Inception: {len(missing)} of its constants are missing, such as"
            f" {missing[0]}: give classify_image_graph_def.pb"
        )
    return found


def _normalize(
    nodes: Mapping[str, GraphNode], theirs: str, ours: str, found: dict[str, np.ndarray], where: str
) -> None:
    """Checks the constants of a normalization, and leaves its factor out where the graph does."""
    node = nodes.get(f"{theirs}/batchnorm")
    epsilon = None if node is None else node.attributes.get("variance_epsilon")
    if node is None or node.op != NORMALIZATION or epsilon != np.float32(EPSILON):
        raise ValueError(
            f"{where} normalizes {theirs} otherwise than the FID's Inception ({NORMALIZATION}, variance_epsilon"
            f" {EPSILON}): give classify_image_graph_def.pb"
        )
    if not node.attributes.get("scale_after_normalization", True):
        found[f"{ours}.bn.weight"] = np.ones_like(found[f"{ours}.bn.weight"])


def graph_names() -> Iterator[tuple[str, str]]:
    """Names of every convolution in the PyTorch files and in the graph."""
    stem = [layer for layer in STEM if isinstance(layer, Conv)]
    for number, layer in enumerate(stem):
        yield layer.name, _numbered("conv", number)
    for block, (name, branches) in enumerate(BLOCKS.items()):
        mixed, towers = _numbered("mixed", block), 0
        for branch in branches:
            convolutions = [layer for layer in branch if isinstance(layer, Conv | list)]
            if not convolutions:
                continue
            if len(branch) == 1:
                yield f"{name}.{branch[0].name}", f"{mixed}/conv"
                continue
            for ours, theirs in _tower(convolutions):
                yield f"{name}.{ours}", f"{mixed}/{_numbered('tower', towers)}/{theirs}"
            towers += 1


def _tower(layers: list[Any]) -> Iterator[tuple[str, str]]:
    for number, layer in enumerate(layers):
        if isinstance(layer, Conv):
            yield layer.name, _numbered("conv", number)
        else:
            yield from ((each.name, f"mixed/{_numbered('conv', place)}") for place, each in enumerate(layer))


def _numbered(name: str, number: int) -> str:
    return f"{name}_{number}" if number else name
