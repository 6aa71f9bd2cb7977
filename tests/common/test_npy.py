"""Numpy files from strangers: sizes are compared before memory is taken, and nothing is unpickled."""

import os
import pickle

import numpy as np
import pytest

from src.common.files.npy import read_npy


@pytest.mark.parametrize("dtype", ["<f4", ">i2", "?", "u1", "<c8", "<f2"])
@pytest.mark.parametrize("shape", [(), (0, 3), (3, 4), (2, 1, 5)])
def test_arrays_come_back(dtype, shape, tmp_path):
    array = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(dtype)
    for order in (array, array.T.copy().T):
        np.save(tmp_path / "a.npy", order)
        for mapped in (False, True):
            read = read_npy(tmp_path / "a.npy", mapped=mapped)
            assert read.dtype == array.dtype and read.shape == shape
            np.testing.assert_array_equal(read, array)
            assert not (mapped and array.size) or (isinstance(read, np.memmap) and not read.flags.writeable)


class Trap:
    def __reduce__(self):
        return os.mkdir, ("trapped",)


def header(text):
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1000000000000,)}\n"), "takes 8,000,000,000,000"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (4294967296, 4294967296, 0)}\n"), "is no shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (-1, -1)}\n") + bytes(8), "is no shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (True,)}\n") + bytes(8), "is no shape"),
        (header("{'descr': '<f8', 'fortran_order': False, 'shape': (1,)}\n") + bytes(9), "has 9 bytes"),
        (header("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}\n") + pickle.dumps([1]), "not numbers"),
        (header("{'descr': [('a', '<f8')], 'fortran_order': False, 'shape': (1,)}\n") + bytes(8), "not numbers"),
        (header("-" * 4000 + "1"), "header is damaged"),
        (header("(" * 4000), "header is damaged"),
        (b"\x93NUMPY\x02\x00\xff\xff\xff\xff", "header has 4,294,967,295 bytes"),
        (b"\x93NUMPY\x03\x00", "format 1 or 2"),
        (b"PK\x03\x04", "archive"),
        (pickle.dumps(Trap(), protocol=4), "pickle"),
        (b"", "does not begin"),
    ],
)
def test_bad_files_are_refused_in_one_sentence(data, reason, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.npy"
    path.write_bytes(data)
    for mapped in (False, True):
        with pytest.raises(ValueError, match=f"'{path}' cannot be read as a numpy array, .*{reason}") as error:
            read_npy(path, mapped=mapped)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "trapped").exists()


def test_objects_missing_files_and_pipes_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "o.npy", np.array([Trap()], object), allow_pickle=True)
    os.mkfifo(tmp_path / "pipe")
    for name, words in (("o.npy", "not numbers"), ("pipe", "plain file"), (".", "plain file")):
        with pytest.raises(ValueError, match=words):
            read_npy(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none' does not exist"):
        read_npy(tmp_path / "none")
    assert not (tmp_path / "trapped").exists()
