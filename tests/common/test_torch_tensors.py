"""Files of torch.save, made with torch 2.13.0 in both of its forms, and pickles that would run code."""

import pathlib
import pickle
import zipfile

import numpy as np
import pytest

from src.common.files.torch_tensors import read_tensors

GOLDEN = pathlib.Path(__file__).parents[1] / "golden/torch_files"
FORMS = ("archive", "stream")


@pytest.mark.parametrize("form", FORMS)
def test_tensors_are_those_that_torch_saved(form):
    """Views, transposed and empty ones, numbers of 8 to 64 bits, parameters; what is no tensor is left out."""
    found, expected = read_tensors(GOLDEN / f"{form}.pth"), np.load(GOLDEN / "expected.npz")
    assert set(found) == {f"state_dict.{name}" for name in expected}
    for name in expected:
        np.testing.assert_array_equal(found[f"state_dict.{name}"].astype(np.float32), expected[name])
    assert found["state_dict.h"].dtype == np.float16 and found["state_dict.i"].dtype == np.int64


class Code:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("ran"),)


def hostile(path, form, value):
    if form == "archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x/data.pkl", pickle.dumps(value, protocol=2))
    else:
        parts = [0x1950A86A20F9469CFC6C, 1001, {}, value, []]
        path.write_bytes(b"".join(pickle.dumps(part, protocol=2) for part in parts))
    return path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [Code(), {"a": Code()}, eval, np.zeros(2)], ids=["call", "inside", "name", "numpy"])
def test_a_file_with_code_is_refused_and_runs_nothing(tmp_path, monkeypatch, form, value):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"cannot be read \(it names .*, which may run code\).*safetensors") as error:
        read_tensors(hostile(tmp_path / "bad.pth", form, value))
    assert "\n" not in str(error.value) and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("form", FORMS)
def test_damage_is_one_sentence_or_leaves_every_tensor_inside_its_storage(tmp_path, form):
    whole, path = (GOLDEN / f"{form}.pth").read_bytes(), tmp_path / "bad.pth"
    for place in range(0, len(whole), 11):
        for data in (whole[:place], whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :]):
            path.write_bytes(data)
            try:
                found = read_tensors(path)
            except ValueError as error:
                assert str(error).startswith("the file of tensors") and "\n" not in str(error)
            else:
                assert all(value.size <= len(whole) for value in found.values())


def test_what_has_no_tensors(tmp_path):
    with pytest.raises(ValueError, match="holds no tensors by name: save the model's state_dict"):
        read_tensors(hostile(tmp_path / "a.pth", "stream", {"epoch": 3}))
    with pytest.raises(FileNotFoundError, match="correct the path"):
        read_tensors(tmp_path / "none.pth")


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [(0, 9, 1), (2, 3, 1), (0, 3, 2), (0, 100, 0)],
    ids=["long", "late", "wide", "repeated"],
)
def test_a_tensor_outside_of_its_storage_is_refused(tmp_path, offset, size, stride):
    """Else it would show other memory of the process."""
    storage = b"(U\x07storagectorch\nFloatStorage\nU\x010U\x03cpuK\x04tQ"
    numbers = b"K%cK%c\x85K%c\x85\x89N" % (offset, size, stride)
    data = b"\x80\x02}U\x01actorch._utils\n_rebuild_tensor_v2\n(" + storage + numbers + b"tRs."
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("x/data.pkl", data)
        archive.writestr("x/data/0", np.arange(4, dtype=np.float32).tobytes())
    with pytest.raises(ValueError, match="a tensor is longer than its storage"):
        read_tensors(tmp_path / "a.pth")
