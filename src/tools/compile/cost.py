"""Arithmetic and memory traffic of a compiled program, read from its text and counted with the loops around it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from src.tools.compile.hlo import Computation, Instruction, Shape, communications, executions, parse


def matmul_flops(text: str, passes: bool = False) -> int:
    """Floating point operations of all matrix products and convolutions of one device's program, loops included.

    A multiplication and its addition are two. Products with padding do not count (the TPU compiler writes batched
    products as convolutions with dilation). Products inside custom kernels are not seen.

    passes   count what a unit for bfloat16 computes: products of float32 at the highest precision are `PASSES` of
             bfloat16 (each number in three parts; Henry, Tang & Heinecke 2019, arXiv 1904.06376)
    """
    computations = parse(text)
    times = executions(computations)
    total = 0
    for computation in computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode in ("dot", "convolution"):
                count = _dot if instruction.opcode == "dot" else _convolution
                each = PASSES if passes and HIGHEST in instruction.attributes else 1
                total += each * times[computation.name] * count(computation, instruction)
    return round(total)


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


HIGHEST = "operand_precision={highest,highest}"
PASSES = 6
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
    traffic = _Traffic(computations)
    inside = {n for c in computations.values() for i in c.instructions.values() if i.opcode != "call"
              and not i.opcode.startswith("async") for n in i.called("calls", "to_apply")}  # fmt: skip
    total = 0
    for computation in computations.values():
        if computation.name not in inside and times[computation.name]:
            moved = sum(traffic.moved(computation, i) for i in computation.instructions.values())
            total += times[computation.name] * moved
    for computation, c in communications(computations):  # those inside fusions; the others are counted above
        if computation.name in inside and "chain_id" in c.attributes:
            total += times[computation.name] * _slow((*computation.operand_shapes(c), *c.shapes))
    return round(total)


class _Traffic:
    """Bytes moved by single instructions of a program."""

    def __init__(self, computations: Mapping[str, Computation]):
        self.computations = computations
        self.users: dict[str, dict[str, list[Instruction]]] = {}

    def moved(self, computation: Computation, instruction: Instruction) -> int:
        """Bytes that one execution of an instruction moves."""
        opcode, operands = instruction.opcode, computation.operand_shapes(instruction)
        if opcode in FREE or opcode.endswith("-done") or (opcode == "custom-call" and not operands):
            return 0
        results = instruction.shapes[:1] if opcode == "copy-start" else instruction.shapes
        if opcode.endswith("-start") and len(results) > 1:  # (operands, results, context)
            results = instruction.shapes[len(operands) : 2 * len(operands)]
        if opcode == "slice-start":
            return sum(s.bytes for s in results) + _slow(results)
        if opcode in ("dynamic-slice", "slice", "gather"):
            return 2 * _slow(results)
        if opcode == "dynamic-update-slice":
            return 2 * _slow(operands[1:2])
        if opcode == "fusion":
            return self._fused(self.computations[instruction.called("calls")[0]], operands, results)
        return _slow(operands) + _slow(results)

    def _fused(self, inner: Computation, operands: Sequence[Shape], results: Sequence[Shape]) -> int:
        """Traffic of a fusion: operands that are only sliced, and results that update an operand, count slices."""
        total = 0
        for parameter in (i for i in inner.instructions.values() if i.opcode == "parameter"):
            shape = operands[int(parameter.literal)]
            total += 0 if shape.fast else min(shape.bytes, self._read(inner, parameter))
        root = inner.root
        if root.opcode == "custom-call":
            return total  # a collective that begins or ends here
        ends = [inner.instructions[o] for o in root.operands] if root.opcode == "tuple" else [root]
        for end, shape in zip(ends, results, strict=False):
            if shape.fast or end.opcode in ("parameter", "get-tuple-element"):  # handed on
                continue
            update = end.operands[1] if end.opcode == "dynamic-update-slice" else end.name
            total += min(shape.bytes, sum(s.bytes for s in inner.instructions[update].shapes))
        return total

    def _read(self, computation: Computation, array: Instruction) -> int:
        """Bytes that the users of an array inside a fusion read of it."""
        if computation.name not in self.users:
            found = self.users[computation.name] = {}
            for instruction in computation.instructions.values():
                for operand in set(instruction.operands):
                    found.setdefault(operand, []).append(instruction)
        total = 0
        for user in self.users[computation.name].get(array.name, []):
            first = user.operands[0] == array.name
            if user.opcode in ("dynamic-slice", "slice", "gather") and first:
                total += sum(s.bytes for s in user.shapes)
            elif user.opcode == "bitcast":
                total += self._read(computation, user)
            elif user.opcode == "fusion":
                inner = self.computations[user.called("calls")[0]]
                places = {str(n) for n, name in enumerate(user.operands) if name == array.name}
                total += sum(self._read(inner, i) for i in inner.instructions.values()
                             if i.opcode == "parameter" and i.literal in places)  # fmt: skip
            elif user.opcode in ("tuple", "custom-call") or (user.opcode == "dynamic-update-slice" and first):
                continue  # handed on, or updated in place
            elif "chain_id" in user.attributes:
                continue  # a collective that goes on meanwhile
            else:
                total += sum(s.bytes for s in array.shapes)
        return total


def _slow(shapes: Sequence[Shape]) -> int:
    return sum(s.bytes for s in shapes if not s.fast)
