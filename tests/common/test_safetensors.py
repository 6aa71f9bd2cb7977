"""Safetensors from strangers: what is accepted reads as the library reads it, all else is one sentence."""

import json
import os
import struct

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from src.common.files.safetensors import SafeTensors, read_header

TENSORS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.arange(4).astype(ml_dtypes.bfloat16),
    "c": np.array(7, np.int64),
    "d": np.zeros((0, 5), np.float16),
    "e": np.array([True, False]),
}


def written(path, header, data=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(shape=(2,), begin=0, end=8, dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def test_tensors_are_mapped_and_equal_the_librarys(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path, metadata={"format": "pt"})
    for place in (path, tmp_path):
        read, want = SafeTensors(place), load_file(path)
        assert sorted(read) == sorted(want) and len(read) == 5
        for name, tensor in want.items():
            assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
            np.testing.assert_array_equal(read[name], tensor)
            assert not read[name].flags.writeable and not read[name].flags.owndata
    small = written(tmp_path / "f8.safetensors", {"x": entry((2,), 0, 2, "F8_E4M3")}, b"\x38\x40")
    assert SafeTensors(small)["x"].astype(np.float32).tolist() == [1.0, 2.0]


@pytest.mark.parametrize("length", [0x80, 0x4B50])
def test_a_header_may_have_the_length_of_another_formats_first_bytes(length, tmp_path):
    """Of a pickle and of a zip archive."""
    header = json.dumps({"x": entry()}).encode()
    path = written(tmp_path / "m.safetensors", header + b" " * (length - len(header)), bytes(8))
    assert read_header(path)["x"].shape == (2,)


BAD = {
    "its header has 1,000,000,000,000;": struct.pack("<Q", 10**12) + b"{}",
    "its header has 18,446,744,073,709,551,615;": b"\xff" * 8 + b"{}",
    "it has 0 bytes": b"",
    "pickle": b"\x80\x04\x95" + bytes(20),
    "zip, pickle or HDF5": b"PK\x03\x04" + bytes(20),
    "Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\n",
    "'x' is there twice": b'{"x":%b,"x":%b}' % ((json.dumps(entry()).encode(),) * 2),
    "'shape' is there twice": b'{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
    "nested more than": b'{"__metadata__":' + b"[" * 5000 + b"]" * 5000 + b"}",
    "its header is no object": b"[]",
    "__metadata__ is no table of texts": {"__metadata__": {"a": 1}, "x": entry()},
    "has not just dtype": {"x": entry() | {"more": 1}},
    "has dtype 'F4'": {"x": entry(dtype="F4")},
    "has dtype \\[1\\]": {"x": entry(dtype=[1])},
    "has shape \\[-2\\]": {"x": entry((-2,))},
    "has shape \\[True\\]": {"x": entry((True,))},
    "has shape \\[2.0\\]": {"x": entry((2.0,))},
    "has shape \\[4294967296, 4294967296\\]": {"x": entry((2**32, 2**32))},
    "has shape \\[0, 4294967296, 4294967296\\]": {"x": entry((0, 2**32, 2**32), 0, 0)},
    "has shape \\[1, 1, 1, 1, 1, 1, 1, 1, 1\\]": {"x": entry((1,) * 9, 0, 4)},
    "is F32 \\[3\\] and has 8 bytes": {"x": entry((3,))},
    "and has -8 bytes": {"x": entry((2,), 8, 0)},
    "'y' begin at byte": {"x": entry(), "y": entry((1,), 4, 8)},  # an overlap
    "'x' begin at byte": {"x": entry((1,), 4, 8)},  # a hole
    "its tensors end at byte": {"x": entry((1,), 0, 4)},
    "its tensors end": {"x": entry((4,), 0, 16)},
    "cannot be printed": {"x\n\0": entry()},
    "longer than 512": {"x" * 600: entry()},
}


@pytest.mark.parametrize("reason", BAD)
def test_bad_files_are_refused_in_one_sentence(reason, tmp_path):
    path, content = tmp_path / "m.safetensors", BAD[reason]
    if isinstance(content, dict) or (content[:1] in b"{[" and content):
        written(path, content, bytes(8))
    else:
        path.write_bytes(content)
    with pytest.raises(
        ValueError, match=f"^the checkpoint '{path}' is not a sound safetensors file .*{reason}"
    ) as error:
        read_header(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 800


@pytest.mark.parametrize("name", ["pytorch_model.bin", "a.PT", "a.pth", "a.ckpt", "flax.msgpack", "a.pkl", "a.npz"])
def test_formats_that_can_run_code_name_the_command_that_converts(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    for path in (tmp_path / name, tmp_path):  # named, or alone in a folder
        with pytest.raises(ValueError, match=r"may run code .* weights_only=True.*save_file") as error:
            SafeTensors(path)
        assert name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="may run code"):
        SafeTensors(tmp_path / "pytorch_model.bin.index.json")
    with pytest.raises(ValueError, match=r"'diffusion_pytorch_model.safetensors'\)"):  # the name that is read
        SafeTensors(tmp_path / "diffusion_pytorch_model.bin")


def shards(folder, table, **files):
    folder.mkdir(exist_ok=True)
    for name, tensors in files.items():
        save_file({tensor: TENSORS[tensor] for tensor in tensors}, folder / f"{name}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def test_shards_are_joined_and_may_not_leave_their_folder(tmp_path, bucket, monkeypatch):
    table = {"a.weight": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"}
    folder = shards(tmp_path / "good", table, one=("a.weight", "b"), two=("c",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for path in folder.iterdir():
        bucket.pipe(f"gs://b/model/{path.name}", path.read_bytes())
    for place in (folder, folder / "model.safetensors.index.json", "gs://b/model/model.safetensors.index.json"):
        read = SafeTensors(place)
        assert set(read) == set(table) and all((read[name] == TENSORS[name]).all() for name in table)
    save_file({"x": TENSORS["b"]}, tmp_path / "secret.safetensors")
    os.symlink(tmp_path / "secret.safetensors", folder / "link.safetensors")
    for number, (change, words) in enumerate(
        (
            ({"x": "../secret.safetensors"}, "only .safetensors files beside it"),
            ({"x": str(tmp_path / "secret.safetensors")}, "only .safetensors files beside it"),
            ({"x": "..\\secret.safetensors"}, "backslash"),
            ({"x": "link.safetensors"}, "is a link out of"),
            ({"x": "model.bin"}, "only .safetensors files beside it"),
            ({"x": 3}, "no weight_map"),
            ({"x": "one.safetensors"}, "'x' is missing"),
            ({"b": "two.safetensors"}, "'b' is not in the index"),
        )
    ):
        shards(folder, table | change)
        with pytest.raises(ValueError, match=words) as error:
            SafeTensors(folder)
        assert "\n" not in str(error.value), number
    shards(folder, table | {"x": "three.safetensors", "y": "four.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"names 'three.safetensors', 'four.safetensors': fetch them"):
        SafeTensors(folder)
    shards(tmp_path / "empty", {})
    with pytest.raises(ValueError, match="no weight_map"):
        SafeTensors(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match=r"none of model.safetensors, model.safetensors.index.json but"):
        SafeTensors(tmp_path)
