"""Data sets that TFDS wrote, read through TFDS without TensorFlow: features, splits, damage, and what TFDS reads."""

import io
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from src.codecs.pixels import crop
from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.sources.tfds import Tfds
from src.data.task import SourceTask
from src.data.templates.class_label import ClassLabel
from src.data.templates.class_prompt import ClassPrompt
from src.data.templates.image_to_caption import ImageToCaption
from tests.helpers import formats
from tests.helpers.fields import table
from tests.helpers.rows import build, rows_of

tfds = pytest.importorskip("tensorflow_datasets")
CODEC = Bytes()
FEATURES = tfds.features
JPEG = formats.encoded(formats.picture(0))


def task(source, template, size=8):
    return SourceTask("t", source, template, table(CODEC, (size, size, 3), classes=5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return formats.make_tfds(tmp_path_factory.mktemp("usual"), splits=("train", "test"))


def test_rows_are_images_labels_and_captions(folder, tmp_path):
    names = tmp_path / "names.json"
    names.write_text(json.dumps(formats.CLASSES))
    data = task(Tfds(folder, label="label", names=names), ClassPrompt(64))
    assert data.rows("train") == 7 and data.template.names[2] == "construction crane"
    for row in range(7):
        with Image.open(io.BytesIO(formats.encoded(formats.picture(row)))) as image:
            np.testing.assert_array_equal(data.read("train", row)["image"], crop(np.asarray(image), 8, 8))
    captions = task(pickle.loads(pickle.dumps(Tfds(folder, caption="captions/text"))), ImageToCaption(32))
    text = build(captions, "train", [6]).tokens["text.caption"]
    assert CODEC.decode(text.value[0][text.valid[0]]) == "a fox, 6"
    assert rows_of(task(Tfds(folder, label="label"), ClassLabel())).cond["label"].tolist() == [0, 1, 2, 3, 4, 0, 1]
    assert [c["id"] for c in Tfds(folder, label="label").classes] == list(formats.CLASSES)


def test_rows_are_those_of_tfds(folder):
    there = tfds.builder_from_directory(folder).as_data_source("test")
    ours = Tfds(folder, split="test", label="label", caption="captions/text")
    for row, example in enumerate(there):
        with Image.open(io.BytesIO(ours[row]["image"])) as image:
            np.testing.assert_array_equal(image, example["image"])
        assert ours[row]["label"] == example["label"]
        assert ours[row]["caption"] == example["captions"]["text"][0].decode()


SPLITS = {
    "train": range(7),
    "test": range(7),
    "train[:10%]": [0],
    "train[:50%]": range(4),
    "train[4:]": [4, 5, 6],
    "train[-2:]": [5, 6],
    "train[3:5]": [3, 4],
    "train[1:2]+train[5:]": [1, 5, 6],
    "train+test": [*range(7)] * 2,
}


@pytest.mark.parametrize("split", SPLITS)
def test_splits_are_those_of_tfds(folder, split):
    source, rows = Tfds(folder, split=split, label="label", caption="captions/text"), SPLITS[split]
    assert [source[i]["caption"] for i in range(len(source))] == [f"a fox, {row}" for row in rows]
    parts = ["train"] * 7 + ["test"] * 7 if split == "train+test" else [split.partition("[")[0]] * len(rows)
    where = [f"mini-{p}.array_record-0000{row // 4} record {row % 4}" for p, row in zip(parts, rows, strict=True)]
    assert [source[i].where for i in range(len(source))] == where


NESTED = {
    "picture": {"left": {"jpeg": FEATURES.Image()}, "mask": FEATURES.Image(shape=(None, None, 1))},
    "answers": FEATURES.Sequence(FEATURES.Text()),
    "texts": FEATURES.Translation(["en", "de"]),
    "objects": FEATURES.Sequence({"kind": FEATURES.ClassLabel(names=["a", "b"]), "box": FEATURES.BBoxFeature()}),
    "kind": FEATURES.ClassLabel(num_classes=3),
    "kinds": FEATURES.Sequence(FEATURES.ClassLabel(names=["x", "y"])),
    "pixels": FEATURES.Tensor(shape=(4, 5, 3), dtype=np.uint8),
    "views": FEATURES.Sequence(FEATURES.Image()),
    "year": FEATURES.Scalar(dtype=np.int64),
    "weights": FEATURES.Tensor(shape=(None, 2), dtype=np.float32),
    "steps": FEATURES.Dataset({"frame": FEATURES.Image(), "said": FEATURES.Text()}),
}


def nested(row):
    file = lambda kind="JPEG", pixels=formats.picture(row): io.BytesIO(formats.encoded(pixels, kind))
    return {
        "picture": {"left": {"jpeg": file()}, "mask": file("PNG", formats.picture(row)[..., 0])},
        "answers": [f"answer {row}", "b"], "texts": {"en": f"fox {row}", "de": "Fuchs"}, "kind": row % 3,
        "objects": [{"kind": 1, "box": FEATURES.BBox(0.0, 0.0, 1.0, 1.0)}] * row, "kinds": [1] * row,
        "pixels": np.full((4, 5, 3), row, np.uint8), "views": [file()] * row, "year": 2000 + row,
        "weights": np.zeros((row, 2), np.float32),
        "steps": [{"frame": file(), "said": f"step {row}"}, {"frame": file(), "said": ""}],
    }  # fmt: skip


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    return formats.make_tfds(tmp_path_factory.mktemp("odd"), rows=3, shards=1, features=NESTED, example=nested)


def test_features_of_any_structure(odd):
    row = lambda number=1, **options: dict(Tfds(odd, **{"image": "pixels", "label": "kind"} | options)[number])
    image = formats.encoded(formats.picture(1))
    assert row(image="picture/left/jpeg", caption="texts/de") == {"image": image, "label": 1, "caption": "Fuchs"}
    assert row(image="views", caption="answers") == {"image": image, "label": 1, "caption": "answer 1"}
    assert row(image="steps/frame", caption="steps/said") == {"image": image, "label": 1, "caption": "step 1"}
    assert [row(number, label="kinds").get("label") for number in range(3)] == [None, 1, None]
    assert row(label="objects/kind")["label"] == 1 and row(label="year")["label"] == 2001
    assert "image" not in row(2, image="views") and "image" not in row(0, image="views")
    np.testing.assert_array_equal(row(2)["image"], np.full((4, 5, 3), 2, np.uint8))
    assert [c["id"] for c in Tfds(odd, image="pixels", label="kind").classes] == ["0", "1", "2"]
    assert [c["id"] for c in Tfds(odd, image="pixels", label="kinds").classes] == ["x", "y"]
    assert Tfds(odd, image="pixels", label="year").classes == [] and len(Tfds(odd, image="pixels", label="year")) == 3
    for label in ("weights", "texts/en"):
        with pytest.raises(ValueError, match=rf"source\.label='{label}' is no ClassLabel and no whole number"):
            len(Tfds(odd, image="pixels", label=label))
    with pytest.raises(ValueError, match=r"has no image: it has .*picture/left/jpeg"):
        len(Tfds(odd, label="kind"))


def test_what_cannot_be_read_is_refused_in_a_sentence(folder, tmp_path):
    opened = lambda path=folder, **options: len(Tfds(path, **{"label": "label"} | options))
    for options, reason in (
        ({"split": "validation"}, "Unknown split 'validation'"),
        ({"split": "train[:10"}, r"split 'train\[:10'.*source\.split"),
        ({"image": "picture"}, "has no picture: it has .*captions/text"),
        ({"label": "captions/text"}, "is no ClassLabel and no whole number"),
        ({"path": folder.parent}, "give the folder of one version"),
        ({"path": tmp_path}, "give the folder of one version"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason) as error:
            opened(**options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"source\.label and source\.caption are empty"):
        Tfds(folder)
    copy = formats.make_tfds(tmp_path)
    told = json.loads((copy / "dataset_info.json").read_text())
    for change, reason in (
        ({"fileFormat": "tfrecord"}, "is in the format tfrecord: prepare it with file_format=array_record"),
        ({"splits": 7}, "cannot be read"),
        ({"splits": []}, r"`splits` is empty.*source\.split='train'"),
    ):
        (copy / "dataset_info.json").write_text(json.dumps(told | change))
        with pytest.raises(ValueError, match=reason):
            opened(copy)
    (copy / "dataset_info.json").write_text(json.dumps(told))
    shard = copy / "mini-train.array_record-00001"
    for spoil in (lambda: shard.write_bytes(b""), shard.unlink):
        spoil()
        with pytest.raises(
            ValueError, match=r"1 of the 2 shards are missing or damaged: mini-train.array_record-00001"
        ):
            opened(copy)
    assert opened(copy, split="train[:4]") == 4  # of the other shard


def test_a_damaged_record_is_a_bad_row(tmp_path):
    folder = formats.make_tfds(tmp_path, shards=1)
    (shard,) = folder.glob("mini-*")
    data = shard.read_bytes()
    place = data.index(formats.encoded(formats.picture(3))[-60:-20])
    shard.write_bytes(data[:place] + b"x" + data[place + 1 :])
    source, bad = Tfds(folder, label="label"), []
    for number in range(len(source)):
        try:
            assert source[number]["image"] == formats.encoded(formats.picture(number))
        except BadRow as flaw:
            bad.append((flaw.where, flaw.reason))
    assert bad == [("mini-train.array_record-00000 record 3", "the record is damaged")]


class Made(tfds.core.GeneratorBasedBuilder):
    """A data set as a user writes one."""

    VERSION = tfds.core.Version("2.0.0")

    def _info(self):
        features = FEATURES.FeaturesDict({"image": FEATURES.Image(), "label": FEATURES.ClassLabel(names=["a", "b"])})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for row in range(5):
            yield row, {"image": io.BytesIO(formats.encoded(formats.picture(row), "PNG")), "label": row % 2}


def test_a_data_set_that_tfds_prepared(tmp_path):
    Made(data_dir=tmp_path, file_format="array_record").download_and_prepare()
    source = Tfds(tmp_path / "made/2.0.0", label="label")
    there = tfds.builder_from_directory(tmp_path / "made/2.0.0").as_data_source("train")
    assert len(source) == 5 and source[0].where == "made-train.array_record-00000-of-00001 record 0"
    for row, example in enumerate(there):  # TFDS shuffles them
        with Image.open(io.BytesIO(source[row]["image"])) as image:
            np.testing.assert_array_equal(image, example["image"])
        assert source[row]["label"] == example["label"]


def test_files_of_a_store_are_copied_one_by_one(folder, monkeypatch, tmp_path):
    from src.data.files import array_record
    from src.data.sources import tfds as module

    copied = []
    monkeypatch.setattr(module, "is_remote", lambda path: True)
    monkeypatch.setattr(array_record, "local_copy", lambda path: copied.append(path.name) or path)
    source = Tfds(folder, split="train[5:]+test[:1]", caption="captions/text")
    assert [source[i]["caption"] for i in range(len(source))] == ["a fox, 5", "a fox, 6", "a fox, 0"]
    assert copied == ["mini-train.array_record-00001", "mini-test.array_record-00000"]


def test_tensorflow_is_not_imported_and_tfds_not_before_it_is_used(folder):
    code = f"""
import sys
from src.data.sources.tfds import Tfds
source = Tfds({str(folder)!r}, label="label")
assert "tensorflow_datasets" not in sys.modules
assert len(source) == 7 and source[0]["label"] == 0
assert "tensorflow" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_shards_may_be_open():
    resource = pytest.importorskip("resource")
    from src.data.sources.tfds import _allow_open_files

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (600, before[1]))
        _allow_open_files(5)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 600
        _allow_open_files(1024)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1024 + 512
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
