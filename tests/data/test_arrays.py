"""Folders of arrays: nothing is read before the first row, and bad folders are refused in one sentence."""

import io
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest

from src.codecs.pixels import Pixels
from src.codecs.text import Bytes
from src.common.files.store import local_copy
from src.data.example import BadRow
from src.data.pipeline.stream import Mixture, Stream, ordered
from src.data.sources.arrays import Arrays
from src.data.task import SourceTask
from src.data.templates.class_label import ClassLabel
from src.data.templates.class_prompt import PHRASES, ClassPrompt
from tests.helpers.fields import field, patches, table
from tests.helpers.rows import build

NAMES = ["crane", "golden retriever"]


@pytest.fixture
def folder(tmp_path):
    images = np.arange(10 * 4 * 4 * 2).reshape(10, 4, 4, 2).astype(np.float16)
    np.save(tmp_path / "images.npy", images)
    np.save(tmp_path / "labels.npy", np.arange(10) % 2)
    (tmp_path / "names.json").write_text(json.dumps(NAMES))
    return tmp_path


FIELDS = table(size=(4, 4, 2), classes=2)


def prompted(folder, held_out=0, **options):
    return SourceTask("a", Arrays(folder, held_out=held_out), ClassPrompt(64, **options), FIELDS)


def labelled(folder, held_out=0, **options):
    return SourceTask("a", Arrays(folder, held_out=held_out), ClassLabel(**options), FIELDS)


@pytest.mark.parametrize("make", [prompted, labelled])
def test_spec_and_fake_need_no_folder_but_rows_do(make, tmp_path):
    task = make(tmp_path / "none")
    spec, fake = task.element_spec(3).tokens["image"], task.fake(3, 0).tokens["image"]
    assert spec.value.shape == fake.value.shape == (3, 4, 4, 2)
    for start in (lambda: Stream(task, 2, 0), lambda: Mixture({"a": task}, {"a": 2}, 0), lambda: task.rows("test")):
        with pytest.raises(FileNotFoundError, match=r"none/.* does not exist") as error:
            start()
        assert "\n" not in str(error.value)


def test_prompts_name_the_class_of_the_image(folder):
    task = prompted(folder, held_out=2, drop=0.3)
    images = np.load(folder / "images.npy").astype(np.float32)
    stream, codec, seen, empty = Stream(task, 4, seed=0), Bytes(), set(), 0
    for _ in range(40):
        batch = next(stream).tokens
        prompt = batch["text.prompt"]
        for row in range(4):
            place = next(i for i in range(10) if (images[i] == batch["image"].value[row]).all())
            assert place < 8  # never a held-out row
            text = codec.decode(prompt.value[row])
            assert text in ("", *(phrase.format(c=NAMES[place % 2]) for phrase in PHRASES["fixed"]))
            ids = prompt.value[row][prompt.valid[row]]
            assert (ids[0], ids[-1]) == (codec.bos, codec.image_start)
            seen.add(text)
            empty += not text
    stream.close()
    assert len(seen) == 9 and abs(empty / 160 - 0.3) < 0.15
    assert batch["text.tail"].value.tolist() == [[codec.image_end, codec.eos]] * 4 and not prompt.target.any()
    (test,) = ordered(task, "test", 2)
    np.testing.assert_array_equal(test.tokens["image"].value, images[8:])
    assert codec.decode(test.tokens["text.prompt"].value[1]) == "Please generate an image of golden retriever."


def test_labels_follow_the_images(folder):
    task = labelled(folder, drop=0.0)
    stream = Stream(task, 10, seed=0)
    batch = next(stream)
    stream.close()
    assert batch.cond["label"].tolist() == (batch.tokens["image"].value[:, 0, 0, 0] // 32 % 2).tolist()
    copy = pickle.loads(pickle.dumps(task))  # what a worker process gets: no arrays, the same rows
    assert "files" not in vars(copy.source)
    assert build(copy, "train", range(3)).cond["label"].tolist() == [0, 1, 0]
    (folder / "names.json").unlink()  # which only prompts need
    assert build(labelled(folder), "train", range(3)).cond["label"].tolist() == [0, 1, 0]
    moments = SourceTask("a", Arrays(folder, moments=True), ClassLabel(), FIELDS | {"image": AUTOENCODER})
    assert moments.element_spec(2).tokens["image"].value.shape == (2, 2, 2, 6)
    with pytest.raises(ValueError, match=r"\(4, 4, 2\).*\(2, 2, 6\)"):
        moments.rows("train")


class Autoencoder:
    """A frozen network that makes latents [2, 2, 3]."""

    where, spec, shape = "frozen", None, (2, 2, 3)


AUTOENCODER = field("image", Pixels(4, 4, 2), Autoencoder(), patches(1))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: np.save(f / "images.npy", np.zeros((10, 4, 5, 2))), r"\(4, 5, 2\).*\(4, 4, 2\)"),
        (lambda f: np.save(f / "images.npy", np.zeros((10, 4, 4, 2), np.uint8)), "uint8"),
        (lambda f: np.save(f / "labels.npy", np.zeros(9, int)), r"\(9,\) labels .* 10 images"),
        (lambda f: np.save(f / "labels.npy", np.arange(10)), "from 0 to 9 .* 2 names"),
        (lambda f: (f / "names.json").write_text(json.dumps(["a" * 80, "b"])), "length=64"),
        (lambda f: (f / "images.npy").write_bytes((f / "images.npy").read_bytes()[:-9]), "images.npy' cannot be read"),
        (lambda f: (f / "names.json").unlink(), "names.json"),
    ],
)
def test_bad_folders_are_refused_before_the_first_row(folder, spoil, words):
    spoil(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=words) as error:
        Stream(prompted(folder), 2, 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("make, classes", [(labelled, 2), (prompted, 2)])
def test_one_wrong_label_is_a_bad_row(folder, make, classes):
    np.save(folder / "images.npy", np.ones((40, 4, 4, 2), np.float16))
    np.save(folder / "labels.npy", np.where(np.arange(40) == 7, classes, np.where(np.arange(40) == 9, -1, 0)))
    mixture = Mixture({"a": make(folder)}, {"a": 40}, 0)
    image = next(mixture)["a"].tokens["image"]
    mixture.close()
    assert image.target.any(axis=1).sum() == 38 == (image.value != 0).all(axis=(1, 2, 3)).sum() and image.valid.all()
    first = mixture.ledger.settle()
    assert first == {"data/skipped/a": 2.0}
    with pytest.raises(BadRow, match=r"labels.npy row 7: the label is no class \(2 of 2 classes\)"):
        make(folder).read("train", 7)


def test_labels_outside_the_classes_are_refused(folder):
    np.save(folder / "labels.npy", np.arange(10) % 3)
    task = labelled(folder)
    for _ in range(2):  # and stay refused
        with pytest.raises(ValueError, match=r"tasks\.a: .*from 0 to 2 .* 2 names"):
            task.rows("train")
    np.save(folder / "labels.npy", np.arange(10) % 2)
    with pytest.raises(ValueError, match="'test' is empty"):
        labelled(folder).rows("test")


def test_a_remote_folder_is_copied_once_and_mapped(folder, bucket, tmp_path_factory, monkeypatch, caplog):
    cache = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    caplog.set_level("INFO")
    for path in folder.iterdir():
        bucket.pipe(f"gs://b/data/{path.name}", path.read_bytes())
    opened, real = [], bucket._open

    def slow(path, mode="rb", **options):
        opened.append(path)
        time.sleep(0.05)
        return real(path, mode, **options)

    monkeypatch.setattr(bucket, "_open", slow)

    def batch_of(task):
        stream = Stream(task, 4, seed=0)
        batch = next(stream)
        stream.close()
        return batch

    def first():
        return batch_of(prompted("gs://b/data"))

    expected = batch_of(prompted(folder))
    np.testing.assert_array_equal(first().tokens["image"].value, expected.tokens["image"].value)
    task = prompted("gs://b/data")
    images = task.source.files.images
    assert isinstance(images, np.memmap) and images.shape == (10, 4, 4, 2)
    first()
    assert sorted(path.rsplit("/")[-1] for path in opened) == ["images.npy", "labels.npy", "names.json"]
    assert "gs://b/data/images.npy" in caplog.text and not list(cache.rglob("*.tmp"))

    # Threads stand for processes: the lock is one of open files. The new images are as long as the old ones.
    images = np.load(folder / "images.npy")
    np.save(folder / "images.npy", images + 1)
    bucket.pipe("gs://b/data/images.npy", (folder / "images.npy").read_bytes())
    bucket.store["b/data/images.npy"].modified += timedelta(seconds=1)
    opened.clear()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: np.load(local_copy("gs://b/data/images.npy")), range(8)))
    assert len(opened) == 1 and all((f == images + 1).all() for f in found)
    assert (Arrays("gs://b/data").files.images == images + 1).all()

    bucket.pipe("gs://b/data/names.json", json.dumps([*NAMES, "more"]).encode())
    monkeypatch.setattr(bucket, "_open", lambda path, mode="rb", **o: io.BytesIO(b"half"))
    with pytest.raises(OSError, match=r"gs://b/data/names.json cannot be copied .* 4 of \d+ bytes") as error:
        _ = Arrays("gs://b/data").classes
    assert "\n" not in str(error.value) and not list(cache.rglob("*.tmp"))
    bucket.rm("gs://b/data/labels.npy")
    with pytest.raises(FileNotFoundError, match=r"gs://b/data/labels\.npy"):
        prompted("gs://b/data").rows("train")
