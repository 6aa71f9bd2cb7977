"""Nodes of a frozen TensorFlow graph (`GraphDef`), from the protobuf wire format, without TensorFlow.

The file is mapped and not copied: tensors are read-only views of it. Of the messages only these fields are read:

| message | fields |
|---|---|
| GraphDef | 1 node |
| NodeDef | 1 name, 2 op, 5 attr (a map: 1 key, 2 value) |
| AttrValue | 3 i, 4 f, 5 b, 8 tensor |
| TensorProto | 1 dtype, 2 tensor_shape (2 dim: 1 size), 4 tensor_content, 5 float_val |
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import os
import struct
from collections.abc import Iterator, Mapping

import numpy as np

from src.common.files.paths import shown

NODES, NAME, AXES, PIECES = 1 << 16, 512, 8, 1 << 16  # at most, of a graph, a name, a tensor, its values
LARGEST = 1 << 40  # values of a tensor
DTYPES = {1: np.dtype("<f4"), 2: np.dtype("<f8"), 3: np.dtype("<i4"), 9: np.dtype("<i8")}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
Value = int | memoryview


@dataclasses.dataclass(frozen=True)
class GraphNode:
    """A node: what it computes, and its attributes that are numbers or tensors of numbers."""

    op: str
    attributes: Mapping[str, float | np.ndarray]

    @property
    def value(self) -> np.ndarray | None:
        """The tensor of a constant, else None."""
        value = self.attributes.get("value")
        return value if self.op == "Const" and isinstance(value, np.ndarray) else None


def read_graph(path: str | os.PathLike[str]) -> dict[str, GraphNode]:
    """The nodes of a local `.pb` file by name.

    Raises FileNotFoundError, and ValueError, in one sentence, for a file that is no graph, is cut off or contradicts
    itself.
    """
    where = f"the graph {shown(os.fspath(path))}"
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{where} does not exist: correct the path")
    try:
        if not os.path.getsize(path):
            raise ValueError("it is empty")
        with open(path, "rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        nodes: dict[str, GraphNode] = {}
        for number, value in _fields(data):
            if number != 1:
                continue
            name, node = _node(_bytes(value))
            if name in nodes or len(nodes) >= NODES:
                raise ValueError(f"node {shown(name)} is there twice, or there are more than {NODES:,}")
            nodes[name] = node
        if not nodes:
            raise ValueError("it has no nodes")
        return nodes
    except (ValueError, struct.error) as error:
        raise ValueError(f"{where} is no sound frozen graph of TensorFlow ({error}): download it again") from error


def _fields(data: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message. Raises ValueError for what is cut off or no message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
        elif kind in (BYTES, FIXED32, FIXED64):
            size = {FIXED32: 4, FIXED64: 8}.get(kind)
            if size is None:
                size, at = _varint(data, at)
            if size > len(data) - at:
                raise ValueError(f"a field of {size:,} bytes begins where {len(data) - at:,} are left")
            value, at = data[at : at + size], at + size
        else:
            raise ValueError(f"a field has the wire type {kind}")
        if not number:
            raise ValueError("a field has the number 0")
        yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for place in range(10):
        if at + place >= len(data):
            raise ValueError("it ends within a number")
        byte = data[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError("a number has more than 10 bytes")


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number stands where a text or message must be")
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise ValueError("bytes stand where a number must be")
    return value


def _text(value: Value) -> str:
    data = bytes(_bytes(value)[: NAME + 1])
    if len(data) > NAME:
        raise ValueError(f"a name has more than {NAME} bytes")
    return data.decode()


def _node(data: memoryview) -> tuple[str, GraphNode]:
    name, op, attributes = "", "", {}
    for number, value in _fields(data):
        if number == 1:
            name = _text(value)
        elif number == 2:
            op = _text(value)
        elif number == 5:
            entry = dict(_fields(_bytes(value)))
            found = _attribute(_bytes(entry[2])) if 1 in entry and 2 in entry else None
            if found is not None:
                attributes[_text(entry[1])] = found
    if not name or not op:
        raise ValueError("a node has no name or no operation")
    return name, GraphNode(op, attributes)


def _attribute(data: memoryview) -> float | np.ndarray | None:
    """A number or a tensor of numbers; None for an attribute of another kind."""
    for number, value in _fields(data):
        if number in (3, 5):
            return _number(value)
        if number == 4:
            return struct.unpack("<f", _bytes(value))[0]
        if number == 8:
            return _tensor(_bytes(value))
    return None


def _shape(data: memoryview) -> tuple[int, ...]:
    found: list[int] = []
    for number, value in _fields(data):
        if number == 2:
            found.append(next((_number(size) for place, size in _fields(_bytes(value)) if place == 1), 0))
        if len(found) > AXES:
            raise ValueError(f"a tensor has more than {AXES} axes")
    return tuple(found)


def _tensor(data: memoryview) -> np.ndarray | None:
    dtype, shape, content, floats = 0, (), None, []
    for number, value in _fields(data):
        if number == 1:
            dtype = _number(value)
        elif number == 2:
            shape = _shape(_bytes(value))
        elif number == 4:
            content = _bytes(value)
        elif number == 5:
            floats.append(np.frombuffer(_bytes(value), "<f4"))
            if len(floats) > PIECES:
                raise ValueError(f"the values of a tensor are in more than {PIECES:,} pieces")
    if dtype not in DTYPES:
        return None
    count = math.prod(shape)
    if count > LARGEST:
        raise ValueError(f"a tensor has the shape {shown(shape)}")
    if content is not None and len(content):
        if len(content) != count * DTYPES[dtype].itemsize:
            raise ValueError(f"a tensor of {shown(shape)} has {len(content):,} bytes")
        return np.frombuffer(content, DTYPES[dtype]).reshape(shape)
    if dtype != 1 or not floats:
        return None
    values = np.concatenate(floats) if len(floats) > 1 else floats[0]
    if len(values) not in (1, count):
        raise ValueError(f"a tensor of {shown(shape)} has {len(values):,} values")
    return values.reshape(shape) if len(values) == count else np.broadcast_to(values[0], shape)  # one stands for all
