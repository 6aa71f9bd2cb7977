"""The FID's Inception from a TensorFlow graph: the same network, and graphs that are none."""

import numpy as np
import pytest
from safetensors.numpy import save_file

pytest.importorskip("google.protobuf")

from src.common.files.graph_def import read_graph
from src.evals.networks import inception
from src.evals.networks.inception_graph import graph_names, read_inception_graph
from src.evals.scores import networks
from tests.golden.inception.make import weights
from tests.helpers.graphs import TYPES, add_node, inception_graph


@pytest.fixture(scope="module")
def tensors():
    return weights(inception.shapes())


@pytest.fixture(scope="module")
def graph(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("graph") / "classify_image_graph_def.pb"
    path.write_bytes(inception_graph(tensors))
    return path


def test_names_are_those_of_the_graph():
    names = dict(graph_names())
    assert len(names) == len(set(names.values())) == 94
    expected = {
        "Conv2d_1a_3x3": "conv", "Conv2d_4a_3x3": "conv_4", "Mixed_5b.branch1x1": "mixed/conv",
        "Mixed_5b.branch5x5_2": "mixed/tower/conv_1", "Mixed_5c.branch3x3dbl_3": "mixed_1/tower_1/conv_2",
        "Mixed_5d.branch_pool": "mixed_2/tower_2/conv", "Mixed_6a.branch3x3": "mixed_3/conv",
        "Mixed_6a.branch3x3dbl_3": "mixed_3/tower/conv_2", "Mixed_6d.branch1x1": "mixed_6/conv",
        "Mixed_6e.branch7x7dbl_5": "mixed_7/tower_1/conv_4", "Mixed_7a.branch3x3_2": "mixed_8/tower/conv_1",
        "Mixed_7a.branch7x7x3_4": "mixed_8/tower_1/conv_3", "Mixed_7b.branch3x3_2b": "mixed_9/tower/mixed/conv_1",
        "Mixed_7c.branch3x3dbl_3a": "mixed_10/tower_1/mixed/conv", "Mixed_7c.branch_pool": "mixed_10/tower_2/conv",
    }  # fmt: skip
    assert {name: names[name] for name in expected} == expected


def test_tensors_and_features_are_those_of_the_other_file(tensors, graph, tmp_path, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda: 1)  # eight compute longer than one
    found = read_inception_graph(graph)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    assert not found["fc.weight"].flags.owndata, "the file is mapped, not copied"
    save_file(tensors, tmp_path / "same.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (1, 20, 30, 3)).astype(np.uint8)
    one, other = (networks.fid_inception(str(path)) for path in (graph, tmp_path / "same.safetensors"))
    features = one.compute(images)
    for name, value in other.compute(images).items():
        np.testing.assert_array_equal(features[name], value, err_msg=name)
    assert not one.warning and "is not the published file" in other.warning


def test_a_graph_that_leaves_the_factor_out_has_none(tensors, tmp_path):
    (tmp_path / "plain.pb").write_bytes(inception_graph(tensors, scaled=False))
    found = read_inception_graph(tmp_path / "plain.pb")
    assert (found["Mixed_7c.branch1x1.bn.weight"] == 1).all() and found["Mixed_7c.branch1x1.bn.bias"].any()


def test_one_value_may_stand_for_all_without_memory(tmp_path):
    graph = TYPES["GraphDef"]()
    node = add_node(graph, "large", "Const", value_floats=np.ones((1, 1), np.float32) * 3)
    for dim in node.attr[0].value.tensor.tensor_shape.dim:
        dim.size = 1 << 18
    (tmp_path / "large.pb").write_bytes(graph.SerializeToString())
    value = read_graph(tmp_path / "large.pb")["large"].value
    assert value.shape == (1 << 18, 1 << 18) and value.strides == (0, 0) and value[7, 9] == 3


def changed(change):
    graph = TYPES["GraphDef"]()
    add_node(graph, "conv/conv2d_params", "Const", value=np.ones((2, 2), np.float32))
    change(graph)
    return graph.SerializeToString()


def longer(graph):
    graph.node[0].attr[0].value.tensor.tensor_shape.dim[0].size = 3


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "it is empty"),
        (b"PK\x03\x04" * 9, r"wire type \d|bytes begins where|field has the number 0"),
        (b"\x0a", "ends within a number"),
        (b"\xff" * 20, "more than 10 bytes"),
        (b"\x12\x02ab", "it has no nodes"),
        (changed(lambda graph: None), "such as conv/batchnorm/beta: give classify_image_graph_def.pb"),
        (changed(longer), r"a tensor of \(3, 2\) has 16 bytes"),
        (changed(lambda graph: add_node(graph, "conv/conv2d_params", "Const")), "is there twice"),
        (changed(lambda graph: add_node(graph, "", "Const")), "a node has no name or no operation"),
        (changed(lambda graph: add_node(graph, "n" * 600, "Const")), "a name has more than 512 bytes"),
    ],
)
def test_what_is_no_graph_is_one_sentence(data, told, tmp_path):
    (tmp_path / "x.pb").write_bytes(data)
    with pytest.raises(ValueError, match=told) as caught:
        read_inception_graph(tmp_path / "x.pb")
    assert "\n" not in str(caught.value)


def test_every_cut_and_every_other_byte_is_refused_or_read(tmp_path):
    """A file that ends anywhere is told; one with another byte never raises anything else."""
    graph = TYPES["GraphDef"]()
    add_node(graph, "conv/conv2d_params", "Const", value=np.ones((2, 2), np.float32))
    add_node(graph, "conv/batchnorm", "Norm", variance_epsilon=0.001, scale_after_normalization=True)
    data, path = graph.SerializeToString(), tmp_path / "x.pb"
    first = graph.node[0].ByteSize() + 2
    for size in range(1, len(data)):
        path.write_bytes(data[:size])
        if size == first:
            assert len(read_graph(path)) == 1
            continue
        with pytest.raises(ValueError, match="is no sound frozen graph"):
            read_graph(path)
    random = np.random.default_rng(0)
    for place in range(len(data)):
        path.write_bytes(data[:place] + bytes([data[place] ^ random.integers(1, 256)]) + data[place + 1 :])
        try:
            read_graph(path)
        except ValueError as error:
            assert "is no sound frozen graph" in str(error)
