"""Files that a source's lists do not name are told at the start: how many, and the first ones."""

import json
import logging
import os

import numpy as np
import pytest
from etils import epath

from src.data.files import unnamed
from src.data.sources.arrays import Arrays
from src.data.sources.captions import Captions
from src.data.sources.documents import Documents
from src.data.sources.image_folders import ImageFolders
from src.data.sources.records import Records
from tests.helpers import formats
from tests.helpers.shards import write_shards

NAMED = ("a/0.png", "./1.png", "@x/2.png", "3.jfif", "4")
ROWS = {
    "captions.jsonl": "".join(json.dumps({"image": name, "caption": "a pear"}) + "\n" for name in NAMED) + "[\n{}\n",
    "metadata.csv": "file_name,text\n" + "".join(f"{name},a pear\n" for name in NAMED) + "5.png\n",
    "documents.jsonl": json.dumps({"parts": [{"text": "x"}, *({"image": n} for n in NAMED)]}) + "\n7\n{}\n",
}
SOURCES = {"captions.jsonl": Captions, "metadata.csv": Captions, "documents.jsonl": Documents}


def made(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
    return folder


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("remote", [False, True])
def test_images_that_no_row_names_are_told_at_every_start(tmp_path, bucket, caplog, monkeypatch, name, remote):
    monkeypatch.setattr(unnamed, "KEPT", 0)
    folder = made(epath.Path("gs://b/f") if remote else tmp_path / "f", *NAMED)
    (folder / name).write_text(ROWS[name])
    assert len(SOURCES[name](folder)) and told(caplog) == []
    made(folder, *(f"b/{i}.PNG" for i in range(5)), "@x/9.png", "a/1.tif", "metadata.tsv", "@eaDir/1.png", ".DS_Store")
    for _ in range(2):  # the second time the cache knows the names
        caplog.clear()
        assert len(SOURCES[name](folder))
        images, others = told(caplog)
        first = "'b/0.PNG', 'b/1.PNG', 'b/2.PNG'"
        assert images == f"{folder}: 5 of {len(NAMED) + 3} images are not named in '{name}', such as {first}"
        assert "2 files are left out" in others and "1 .tif (such as 'a/1.tif')" in others and "1 .tsv" in others
    rows = ROWS[name].replace("./1.png", "b/0.PNG")  # another list, and no image of its own folder is missed
    (folder / name).write_text(rows + "\n")
    caplog.clear()
    assert len(SOURCES[name](folder)) and "5 of 8 images are not named" in told(caplog)[0] and "'1.png'" in caplog.text


def test_long_lists_and_many_files_are_bounded(tmp_path, caplog, monkeypatch):
    folder = made(tmp_path, "0.png", "1.png", "2.png")
    (folder / "captions.jsonl").write_text('{"image": "0.png", "caption": "a pear"}\n')
    monkeypatch.setattr(unnamed, "FILES", 2)
    with caplog.at_level(logging.INFO):
        assert len(Captions(folder)) == 1
    assert told(caplog) == [f"{folder}: 1 of 2 images are not named in 'captions.jsonl', such as '1.png'"]
    assert f"{folder}: only the first 2 files are compared with 'captions.jsonl'" in caplog.text
    caplog.clear()
    monkeypatch.setattr(unnamed, "BYTES", 10)
    with caplog.at_level(logging.INFO):
        assert len(Captions(folder)) == 1
    assert f"{folder}: its images are not compared with 'captions.jsonl'" in caplog.text and not told(caplog)


def test_files_beside_classes_shards_and_arrays_are_told(tmp_path, caplog):
    folder, names = formats.make_imagenet(tmp_path / "classes")
    names = names.rename(folder / "names.json")
    assert len(ImageFolders(folder, names=names)) and told(caplog) == []
    made(folder, "n01440764.tar", "5.jpg", "README")
    assert len(ImageFolders(folder, names=names))
    (line,) = told(caplog)
    for what in ("1 images", "1 .tar", "1 without an ending"):
        assert f"{what} beside the folders of the classes (such as" in line

    shards = tmp_path / "shards"
    write_shards(shards, [("a fox", formats.encoded(formats.picture(0)))], rows=1)
    arrays = made(tmp_path / "arrays", "labels.npy")
    np.save(arrays / "images.npy", np.zeros((2, 4, 4, 3), np.float32))
    np.save(arrays / "labels.npy", np.zeros(2, np.int64))
    for source, name in ((Records(shards), "00009.arrayrecord"), (Arrays(arrays), "images2.npy")):
        caplog.clear()
        assert len(source) and told(caplog) == []
        made(epath.Path(source.folder), name, ".DS_Store")
        assert len(type(source)(source.folder))
        assert f"1 files are left out: 1 {os.path.splitext(name)[1]} (such as '{name}')" in told(caplog)[0]


def test_a_second_text_of_an_image_is_told(tmp_path, caplog):
    made(tmp_path, "1.png", "1.txt", "1.TXT")
    (tmp_path / "1.txt").write_text("a pear")
    source = Captions(tmp_path)
    assert [source[i]["caption"] for i in range(len(source))] == ["a pear"]
    assert "1 second texts of an image (such as '1.TXT')" in told(caplog)[0]
