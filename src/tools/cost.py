"""Arithmetic and memory traffic of a compiled program, read from its text and counted with the loops around it."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from src.tools.hlo import Computation, Instruction, Shape, executions, parse


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


FREE = {  # no traffic of their own, or counted where they start or inside what they call
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while", "conditional", "call"),
    *("opt-barrier", "partition-id", "replica-id", "async-start", "async-update", "async-done"),
}


def hbm_bytes(text: str) -> int:
    """Bytes that one device's program reads from and writes to its main memory, loops included.

    Every instruction reads its operands and writes its results, a fusion as a whole; arrays that the compiler keeps in
    fast memory count nothing. Of an array that is only sliced, or updated in place, the slice counts.
    """
    computations = parse(text)
    times = executions(computations)
    inside = {n for c in computations.values() for i in c.instructions.values() if i.opcode != "call"
              and not i.opcode.startswith("async") for n in i.called("calls", "to_apply")}  # fmt: skip
    total = 0
    for computation in computations.values():
        if computation.name in inside or not times[computation.name]:
            continue
        moved = sum(_moved(computations, computation, i) for i in computation.instructions.values())
        total += times[computation.name] * moved
    return total


def _moved(computations: dict[str, Computation], computation: Computation, instruction: Instruction) -> int:
    """Bytes that one execution of an instruction moves."""
    opcode, operands = instruction.opcode, computation.operand_shapes(instruction)
    if opcode in FREE or opcode.endswith("-done"):
        return 0
    results = instruction.shapes[:1] if opcode in ("copy-start", "slice-start") else instruction.shapes
    if opcode.endswith("-start") and len(results) > 1:  # (operands, results, context)
        results = instruction.shapes[len(operands) : 2 * len(operands)]
    if opcode in ("dynamic-slice", "slice", "gather", "slice-start"):
        return _slow(results) * (1 if opcode == "slice-start" else 2)
    if opcode == "dynamic-update-slice":
        return 2 * _slow(operands[1:2])
    if opcode == "fusion":
        return _fused(computations[instruction.called("calls")[0]], operands, results)
    return _slow(operands) + _slow(results)


def _fused(inner: Computation, operands: list[Shape], results: tuple[Shape, ...]) -> int:
    """Traffic of a fusion: operands that are only sliced, and results that update an operand, count their slices."""
    users: dict[str, list[Instruction]] = {}
    for instruction in inner.instructions.values():
        for operand in instruction.operands:
            users.setdefault(operand, []).append(instruction)
    total = 0
    for parameter in (i for i in inner.instructions.values() if i.opcode == "parameter"):
        shape = operands[int(parameter.literal)]
        if shape.fast:
            continue
        reads = [_read(inner, users, parameter.name, user) for user in users.get(parameter.name, [])]
        total += min(shape.bytes, sum(shape.bytes if r is None else r for r in reads))
    root = inner.root
    ends = [inner.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
    for end, shape in zip(ends, results, strict=False):
        if not shape.fast:
            update = end.operands[1] if end.opcode == "dynamic-update-slice" else None
            total += sum(s.bytes for s in inner.instructions[update].shapes) if update else shape.bytes
    return total


def _read(inner: Computation, users: dict, name: str, user: Instruction) -> int | None:
    """Bytes that one user reads of an array; None for all of it."""
    if user.opcode in ("dynamic-slice", "slice", "gather") and user.operands[0] == name:
        return sum(s.bytes for s in user.shapes)
    if user.opcode == "dynamic-update-slice" and user.operands[0] == name:
        return 0
    if user.opcode == "bitcast" and (further := users.get(user.name)):
        reads = [_read(inner, users, user.name, u) for u in further]
        return None if None in reads else sum(reads)
    return None


def _slow(shapes: Sequence[Shape]) -> int:
    return sum(s.bytes for s in shapes if not s.fast)
