"""Collectives of a compiled program, read from its text and counted with the loops around them.

XLA's own `cost_analysis()` counts the body of a loop once and says nothing of the network. The text of
`jitted.lower(...).compile().as_text()` holds what is missing.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np
from absl import logging

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of one device's program.

    kind    one of KINDS
    axes    the mesh axes over which the members of a group differ, in the order of the mesh
    bytes   what one device receives over the network in one execution, by a ring algorithm (see `collectives`)
    times   executions of it in one run of the program
    """

    kind: str
    axes: tuple[str, ...]
    bytes: int
    times: int


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array of the program. `fast` is True outside of the main memory (on TPU: in VMEM, SMEM …)."""

    dtype: str
    dims: tuple[int, ...]
    fast: bool = False

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        """Bytes without padding."""
        return math.ceil(self.size * _bits(self.dtype) / 8)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    opcode: str
    shapes: tuple[Shape, ...]  # several for a tuple, flattened
    operands: tuple[str, ...]
    attributes: str
    root: bool
    literal: str  # what stands between the parentheses

    def called(self, *names: str) -> list[str]:
        """The computations named by these attributes."""
        found = re.findall(rf"\b(?:{'|'.join(names)})=(%[\w.\-]+|\{{[^}}]*\}})", self.attributes)
        return [n for f in found for n in re.findall(r"%([\w.\-]+)", f)]


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named sequence of instructions."""

    name: str
    instructions: Mapping[str, Instruction]
    entry: bool = False

    @property
    def root(self) -> Instruction:
        """The instruction whose value the computation returns."""
        return next(i for i in self.instructions.values() if i.root)

    def operand_shapes(self, instruction: Instruction) -> list[Shape]:
        """The arrays that an instruction reads."""
        return [s for name in instruction.operands for s in self.instructions[name].shapes]


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
    """The collectives of a program, in the order of the text.

    text         `compiled.as_text()`, the program of one device
    mesh_shape   sizes by axis name, in the order of the mesh; devices are numbered along the last axis first

    With n members of a group and the full size F in bytes, a device receives by a ring algorithm:
    all-gather F (n-1)/n, F gathered; reduce-scatter F (n-1)/n, F before scattering; all-reduce 2 F (n-1)/n;
    all-to-all F (n-1)/n; collective-permute F. Asynchronous forms count once, at their start. A reduce-scatter
    that the TPU compiler writes as an all-reduce fused with the slice of its result counts as reduce-scatter.
    Both branches of a conditional count. Groups of one device are left out.
    """
    computations = parse(text)
    times = executions(computations)
    found = []
    for computation, instruction in communications(computations):
        groups = _groups(instruction, math.prod(mesh_shape.values()))
        if not times[computation.name] or (n := groups.shape[1]) == 1:
            continue
        kind = instruction.opcode.removesuffix("-start")
        local = sum(s.bytes for s in computation.operand_shapes(instruction))
        if kind == "all-reduce" and _scattered(computation, instruction, n):
            kind = "reduce-scatter"
        size = _received(kind, local, n)
        found.append(Collective(kind, _axes(groups, mesh_shape), size, times[computation.name]))
    return found


def communications(computations: Mapping[str, Computation]) -> Iterator[tuple[Computation, Instruction]]:
    """Every collective once, with where it stands.

    The TPU compiler spreads one over a chain of fusions that compute meanwhile, and repeats it in each.
    """
    seen = set()
    for computation in computations.values():
        for instruction in computation.instructions.values():
            if instruction.opcode.removesuffix("-start") not in KINDS:
                continue
            chain = re.search(r'chain_id="?(\w+)', instruction.attributes)
            channel = re.search(r"channel_id=(\d+)", instruction.attributes)
            name = (chain[1], channel and channel[1]) if chain else (computation.name, instruction.name)
            if name not in seen:
                seen.add(name)
                yield computation, instruction


@functools.lru_cache(maxsize=1)
def parse(text: str) -> dict[str, Computation]:
    """The computations of a program by name, callees before callers."""
    computations: dict[str, Computation] = {}
    name, entry, body = "", False, {}
    for line in text.splitlines():
        if name and re.match(r"\}(?!\})", line):  # the text of a kernel may begin a line with two
            computations[name] = Computation(name, body, entry)
            name = ""
        elif name:
            if (instruction := _instruction(line)) is not None:
                body[instruction.name] = instruction
        elif match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            name, entry, body = match[2], bool(match[1]), {}
    return computations


def executions(computations: Mapping[str, Computation]) -> dict[str, float]:
    """How often each computation runs in one run of the program: the product of the trips of the loops around it.

    Both branches of a conditional count, and of a choice among more (pictures in buckets) all the same share.
    """
    times = {name: int(c.entry) for name, c in computations.items()}
    for computation in reversed(computations.values()):  # callers stand after what they call
        for instruction in computation.instructions.values():
            if instruction.opcode in ("async-update", "async-done"):
                continue  # they name the computation of their start again
            runs = times[computation.name]
            trips = _trips(computations, computation, instruction) if runs and instruction.opcode == "while" else 1
            choices = instruction.called("branch_computations")
            for name in choices:
                times[name] += runs if len(choices) < 3 else runs / len(choices)
            once = ("calls", "to_apply", "true_computation", "false_computation")
            for name in instruction.called(*once, "called_computations"):
                times[name] += runs
            for name in instruction.called("body"):
                times[name] += runs * trips
            for name in instruction.called("condition"):
                times[name] += runs * (trips + 1)
    return times


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if match is None:
        return None
    rest = line[match.end() :]
    end = _closing(rest, 0) + 1 if rest[0] == "(" else rest.index(" ")
    shapes, rest = _shapes(rest[:end]), rest[end:].lstrip()
    start = rest.index("(")
    close = _closing(rest, start)
    literal = rest[start + 1 : close]
    operands = tuple(re.findall(r"%([\w.\-]+)", literal))
    return Instruction(match[2], rest[:start], shapes, operands, rest[close + 1 :], bool(match[1]), literal)


def _closing(text: str, start: int) -> int:
    """The place of the parenthesis that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"the program text has an open parenthesis: {text[:80]}")


def _shapes(text: str) -> tuple[Shape, ...]:
    """`f32[2,3]{1,0:T(8,128)S(1)}`, or a tuple of such; S(n) with n > 0 names another memory than the main one."""
    found = re.findall(r"([a-z]\w*)\[([^\]]*)\](\{[^}]*\})?", text)
    dims = [tuple(int(n.lstrip("<=")) for n in inner.split(",") if n) for _, inner, _ in found]
    return tuple(
        Shape(dtype, d, bool(re.search(r"S\([1-9]", layout))) for (dtype, _, layout), d in zip(found, dims, strict=True)
    )


def _bits(dtype: str) -> int:
    if dtype == "pred":
        return 8
    match = re.match(r"[a-z]+(\d+)", dtype)
    return int(match[1]) if match else 0  # token, opaque


def _trips(computations: Mapping[str, Computation], caller: Computation, loop: Instruction) -> int:
    """How often the body of a loop runs: what the compiler notes, else from its condition `counter < constant`."""
    if match := re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes):
        return int(match[1])
    condition, body = (computations[loop.called(key)[0]] for key in ("condition", "body"))
    compare, place = condition.root, condition
    operands = list(compare.operands)
    if compare.opcode == "fusion":
        inner = computations[compare.called("calls")[0]]
        compare = inner.root
        operands = [operands[int(inner.instructions[o].literal)] for o in compare.operands
                    if inner.instructions[o].opcode == "parameter"]  # fmt: skip
    if compare.opcode == "compare" and len(operands) == 2 and "direction=LT" in compare.attributes:
        bound = _constant(place, operands[1])
        index = re.search(r"index=(\d+)", place.instructions[operands[0]].attributes)
        if bound is not None and index is not None:
            first = _constant(caller, caller.instructions[loop.operands[0]].operands[int(index[1])])
            step = _step(body, int(index[1]))
            if first is not None and step:
                return max(0, math.ceil((bound - first) / step))
    logging.warning("the loop %s has no readable number of trips; it is counted as one", loop.name)
    return 1


def _constant(computation: Computation, name: str) -> int | None:
    """The value of an integer constant, through copies."""
    instruction = computation.instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "copy-start", "copy-done"):
        instruction = computation.instructions[instruction.operands[0]]
    value = re.fullmatch(r"-?\d+", instruction.literal) if instruction.opcode == "constant" else None
    return int(value[0]) if value else None


def _step(body: Computation, index: int) -> int | None:
    """What one trip adds to the counter; 1 where the addition is fused away."""
    if body.root.opcode != "tuple":
        return 1
    instruction = body.instructions[body.root.operands[index]]
    while instruction.opcode in ("copy", "bitcast", "copy-start", "copy-done"):
        instruction = body.instructions[instruction.operands[0]]
    values = [_constant(body, o) for o in instruction.operands] if instruction.opcode in ("add", "fusion") else []
    return next((v for v in values if v is not None), 1)


def _groups(instruction: Instruction, devices: int) -> np.ndarray:
    """The groups of a collective, `[groups, members]`; for a permutation its moves, `[moves, 2]`."""
    text = instruction.attributes
    if match := re.search(r"source_target_pairs=\{(\{.*?\})\}", text):
        pairs = np.array(_lists(match[1]))
        moves = pairs[pairs[:, 0] != pairs[:, 1]]
        return moves if len(moves) else np.zeros((1, 1), int)
    if match := re.search(r"replica_groups=\{(\{.*?\})\}", text):
        return np.array(_lists(match[1]))
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return _iota(match[2], match[3]).reshape(_numbers(match[1]))
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", text):
        return _mesh_groups(match[1], match[2], match[3])
    return np.arange(devices)[None]  # replica_groups={}: all of them


def _mesh_groups(axes: str, order: str, chosen: str) -> np.ndarray:
    """`mesh['a'=2,'b'=4] {'b'}`: one group along the named axes; `'b':(2)2` is the part of b after a factor of 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", axes)}
    ids = re.search(r"device_ids=\(?\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", order)
    flat = _iota(ids[2], ids[3]) if ids else np.arange(math.prod(sizes.values()))
    parts = {name: (int(pre or 1), int(size or sizes[name]))
             for name, pre, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)}  # fmt: skip
    shape, inside = [], []
    for name, size in sizes.items():
        pre, part = parts.get(name, (size, 1))
        inside += [False, name in parts, False]
        shape += [pre, part, size // (pre * part)]
    order_ = [i for i, member in enumerate(inside) if not member] + [i for i, member in enumerate(inside) if member]
    members = math.prod(n for n, member in zip(shape, inside, strict=True) if member)
    return flat.reshape(shape).transpose(order_).reshape(-1, members)


def _iota(dims: str, permutation: str | None) -> np.ndarray:
    ids = np.arange(math.prod(_numbers(dims))).reshape(_numbers(dims))
    return (ids.transpose(_numbers(permutation)) if permutation else ids).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _lists(text: str) -> list[list[int]]:
    return [_numbers(inner) for inner in re.findall(r"\{([\d,]+)\}", text)]


def _axes(groups: np.ndarray, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
    places = np.stack(np.unravel_index(groups, tuple(mesh_shape.values())))
    varies = (places != places[:, :, :1]).any(axis=(1, 2))
    return tuple(name for name, v in zip(mesh_shape, varies, strict=True) if v)


def _received(kind: str, local: int, n: int) -> int:
    """Bytes that one device receives when each of n holds `local` bytes before."""
    rings = {"all-gather": n - 1, "all-reduce": 2 * (n - 1) / n, "collective-permute": 1}
    return round(local * rings.get(kind, (n - 1) / n))


def _scattered(computation: Computation, reduce: Instruction, n: int) -> bool:
    """Is only this device's n-th part of an all-reduce kept, inside a fusion of the two?"""
    root = computation.root
    while root.opcode in ("bitcast", "copy", "convert"):
        root = computation.instructions[root.operands[0]]
    users = [i for i in computation.instructions.values() if reduce.name in i.operands]
    whole = sum(s.size for s in reduce.shapes)
    return root.opcode == "dynamic-slice" and len(users) == 1 and sum(s.size for s in root.shapes) * n == whole
