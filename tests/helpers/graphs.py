"""TensorFlow graphs as protobuf writes them, from message types that are made here."""

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from src.evals.networks.inception import shapes
from src.evals.networks.inception_graph import NORMALIZATION, PARTS, graph_names

# Fields of the messages in TensorFlow's core/framework: name, number, type.
MESSAGES = {
    "GraphDef": [("node", 1, "NodeDef*")],
    "NodeDef": [("name", 1, "string"), ("op", 2, "string"), ("input", 3, "string*"), ("attr", 5, "Entry*")],
    "Entry": [("key", 1, "string"), ("value", 2, "AttrValue")],
    "AttrValue": [("s", 2, "bytes"), ("i", 3, "int64"), ("f", 4, "float"), ("b", 5, "bool"), ("type", 6, "int32"),
                  ("tensor", 8, "TensorProto")],
    "TensorProto": [("dtype", 1, "int32"), ("tensor_shape", 2, "Shape"), ("version_number", 3, "int32"),
                    ("tensor_content", 4, "bytes"), ("float_val", 5, "float*")],
    "Shape": [("dim", 2, "Dim*")],
    "Dim": [("size", 1, "int64"), ("name", 2, "string")],
}  # fmt: skip


def _types():
    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="graph.proto", package="small", syntax="proto3")
    for message, fields in MESSAGES.items():
        made = file.message_type.add(name=message)
        if message == "AttrValue":
            made.oneof_decl.add(name="value")  # one of its fields is written, also where it is 0
        for name, number, kind in fields:
            field = made.field.add(name=name, number=number, label=3 if kind.endswith("*") else 1)
            if message == "AttrValue":
                field.oneof_index = 0
            kind = kind.rstrip("*")
            if kind in MESSAGES:
                field.type, field.type_name = kinds.TYPE_MESSAGE, f".small.{kind}"
            else:
                field.type = getattr(kinds, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"small.{name}")) for name in MESSAGES}


TYPES = _types()


def add_node(graph, name, op, **attributes):
    """A node with numbers and tensors as attributes; `value_floats`: a tensor in `float_val`."""
    node = graph.node.add(name=name, op=op, input=["before"])
    for key, value in attributes.items():
        entry = node.attr.add(key=key.removesuffix("_floats"))
        if isinstance(value, np.ndarray):
            tensor = entry.value.tensor
            tensor.dtype = 1
            for size in value.shape:
                tensor.tensor_shape.dim.add(size=size)
            if key.endswith("_floats"):
                tensor.float_val.extend(value.reshape(-1).tolist())
            else:
                tensor.tensor_content = value.astype("<f4").tobytes()
        elif isinstance(value, bool):
            entry.value.b = value
        else:
            entry.value.f = value
    return node


def inception_graph(tensors, scaled=True):
    """The graph of the FID's Inception with tensors by their PyTorch names, as bytes."""
    graph = TYPES["GraphDef"]()
    add_node(graph, "DecodeJpeg/contents", "Const")
    for ours, theirs in graph_names():
        kernel = tensors[f"{ours}.conv.weight"].transpose(2, 3, 1, 0)
        add_node(graph, f"{theirs}/conv2d_params", "Const", value=kernel)
        for name, part in PARTS.items():
            form = "value_floats" if name == "beta" else "value"
            add_node(graph, f"{theirs}/batchnorm/{name}", "Const", **{form: tensors[f"{ours}.bn.{part}"]})
        options = {"variance_epsilon": 0.001, "scale_after_normalization": scaled}
        add_node(graph, f"{theirs}/batchnorm", NORMALIZATION, **options)
    add_node(graph, "softmax/weights", "Const", value=tensors["fc.weight"].T)
    add_node(graph, "softmax/biases", "Const", value=tensors["fc.bias"])
    assert len(graph.node) == len(shapes()) + 1 + len(list(graph_names()))
    return graph.SerializeToString()
