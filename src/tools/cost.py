"""Arithmetic of a compiled program, read from its text and counted with the loops around it."""

from __future__ import annotations

import math
import re

import numpy as np

from src.tools.hlo import Computation, Instruction, executions, parse


def matmul_flops(text: str) -> int:
    """Floating point operations of all matrix products and convolutions of one device's program, loops included.

    A multiplication and its addition are two. Products with padding do not count (the TPU compiler writes batched
    products as convolutions with dilation). Products inside custom kernels are not seen.
    """
    computations = parse(text)
    times = executions(computations)
    total = 0
    for computation in computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                count = _dot if instruction.opcode == "dot" else _convolution
                total += times[computation.name] * count(computation, instruction)
    return total


def _dot(computation: Computation, dot: Instruction) -> int:
    left = computation.operand_shapes(dot)[0].dims
    inner = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    contracted = [left[int(i)] for i in inner[1].split(",") if i] if inner else []
    return 2 * dot.shapes[0].size * math.prod(contracted)


def _convolution(computation: Computation, convolution: Instruction) -> int:
    """2 · inputs · outputs · batch · the pairs (output place, kernel place) that meet an input, for each dimension."""
    image, kernel = computation.operand_shapes(convolution)
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", convolution.attributes)
    group = re.search(r"\bfeature_group_count=(\d+)", convolution.attributes)
    batches = re.search(r"batch_group_count=(\d+)", convolution.attributes)
    inputs, filters, outputs = labels[1], labels[2], labels[3]
    count = image.dims[inputs.index("f")] // (int(group[1]) if group else 1)
    count *= convolution.shapes[0].dims[outputs.index("f")]
    count *= image.dims[inputs.index("b")] // (int(batches[1]) if batches else 1)
    for place in (c for c in inputs if c.isdigit()):
        arrays = ((image, inputs), (kernel, filters), (convolution.shapes[0], outputs))
        sizes = [shape.dims[names.index(place)] for shape, names in arrays]
        count *= _meetings(*sizes, int(place), convolution.attributes)
    return 2 * count


def _meetings(size: int, window: int, out: int, place: int, attributes: str) -> int:
    """How many pairs (output place, kernel place) of one spatial dimension touch an input that is not padding."""
    match = re.search(r"window=\{([^}]*)\}", attributes)
    options = dict(item.split("=") for item in match[1].split()) if match else {}
    stride, low, base, wide = (
        int(options[name].split("x")[place].split("_")[0]) if name in options else default
        for name, default in (("stride", 1), ("pad", 0), ("lhs_dilate", 1), ("rhs_dilate", 1))
    )
    at = np.arange(out)[:, None] * stride + np.arange(window) * wide - low
    return int(((at >= 0) & (at % base == 0) & (at // base < size)).sum())
