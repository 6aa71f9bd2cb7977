"""Folders of classes as they are found: what systems leave behind, other formats, and the files of class names."""

import json
import logging
import os
import shutil

import pytest
from etils import epath

from src.data.files import left_out
from src.data.sources.image_folders import ImageFolders
from tests.helpers import formats

JPEG = formats.encoded(formats.picture(0))
SYSTEMS = (
    *("__MACOSX/cat/._1.jpg", "@eaDir/1.jpg", "lost+found/1.jpg", ".ipynb_checkpoints/1.jpg", ".Trash-1000/1.jpg"),
    *("System Volume Information/1.jpg", "$RECYCLE.BIN/1.jpg", "@tmp/1.jpg", "#recycle/1.jpg", "LOST+FOUND/1.jpg"),
    *("cat/@eaDir/1.jpg/SYNOFILE_THUMB_M.jpg", "cat/.ipynb_checkpoints/1-checkpoint.jpg", "cat/._1.jpg"),
    *("cat/.DS_Store", "cat/Thumbs.db", "cat/desktop.ini", ".DS_Store", "._cat", "Thumbs.db"),
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def made(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(JPEG)
    return folder


def rows(source):
    return [(source[i].where, source[i]["label"]) for i in range(len(source))]


@pytest.mark.parametrize("path", [str, epath.Path])
def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path, caplog, path):
    folder = made(tmp_path / "f", "cat/1.jpg", "dog/1.jpg", "zebra/1.jpg", *SYSTEMS)
    source = ImageFolders(path(folder))
    assert rows(source) == [("cat/1.jpg", 0), ("dog/1.jpg", 1), ("zebra/1.jpg", 2)]
    assert [c["name"] for c in source.classes] == ["cat", "dog", "zebra"]
    assert "left out" not in caplog.text


@pytest.mark.parametrize("name", sorted({name.partition("/")[0] for name in SYSTEMS if name.count("/")} - {"cat"}))
def test_each_folder_of_a_system_moves_no_label(tmp_path, name):
    folder = made(tmp_path / "f", "Cat/1.jpg", "zebra/1.jpg", f"{name}/1.jpg")
    assert rows(ImageFolders(folder)) == [("Cat/1.jpg", 0), ("zebra/1.jpg", 1)]


def test_a_folder_that_begins_as_those_of_systems_is_told_and_can_be_named(tmp_path, caplog):
    folder = made(tmp_path / "f", "@cats/1.jpg", "dog/1.jpg")
    assert rows(ImageFolders(folder)) == [("dog/1.jpg", 0)]
    assert "folders that are no classes: @cats" in caplog.text
    (tmp_path / "names.json").write_text(json.dumps({"@cats": "cats", "dog": "dog"}))
    assert rows(ImageFolders(folder, names=tmp_path / "names.json")) == [("@cats/1.jpg", 0), ("dog/1.jpg", 1)]


def test_formats_are_read_or_counted_by_ending_at_every_start(tmp_path, caplog):
    read = ("1.webp", "2.JPG", "3.jfif", "4.jpe", "5.GIF", "6.bmp", "7.PNG", "8.apng", "9.mpo")
    other = ("1.heic", "2.HEIC", "3.tif", "4.avif", "5", "6.txt", ".7.jpg")
    folder = made(tmp_path / "f", *(f"cat/{name}" for name in read + other), "dog/1.jpg", "2.png", "cat/old/1.jpg")
    for _ in range(2):  # from the cache, too
        caplog.clear()
        source = ImageFolders(folder)
        assert rows(source) == [(f"cat/{name}", 0) for name in read] + [("dog/1.jpg", 1)]
        told = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert len(told) == 1 and "9 files are left out: 2 .heic (such as 'cat/1.heic')" in told[0]
        for part in ("1 .tif", "1 .avif", "1 .txt", "1 .jpg (hidden)", "1 without an ending", "'cat/old'", "'2.png'"):
            assert part in told[0]


def test_empty_folders_keep_their_numbers_and_are_told(tmp_path, caplog):
    folder = made(tmp_path / "f", "ant/1.jpg", "cat/1.jpg")
    (folder / "bee").mkdir()
    assert rows(ImageFolders(folder)) == [("ant/1.jpg", 0), ("cat/1.jpg", 2)]
    assert "no image in the folders of 1 classes, which keep their numbers: bee" in caplog.text


def test_splits_and_numbers_that_become_classes_are_told(tmp_path, caplog):
    folder = made(tmp_path / "f", "cat/1.jpg", "test/1.jpg", "train/1.jpg", "test tube/1.jpg")
    assert len(ImageFolders(folder).classes) == 4
    assert "called as splits are classes like the others: test, train; give the folder of one split" in caplog.text
    caplog.clear()
    (tmp_path / "names.json").write_text(json.dumps({name: name for name in ("cat", "test", "train", "test tube")}))
    assert len(ImageFolders(folder, names=tmp_path / "names.json")) == 4 and not caplog.text
    assert len(ImageFolders(made(tmp_path / "g", "08/1.jpg", "09/1.jpg", "10/1.jpg"))) == 3 and not caplog.text
    assert rows(ImageFolders(made(tmp_path / "h", "1/1.jpg", "2/1.jpg", "10/1.jpg")))[1] == ("10/1.jpg", 1)
    assert "classes are sorted as texts: '2' is the class 2; write numbers with as many digits" in caplog.text


def test_a_folder_one_level_too_high_is_refused_with_what_it_has(tmp_path):
    folder = made(tmp_path / "f", "train/cat/1.jpg", "val/cat/1.jpg")
    with pytest.raises(ValueError, match=r"no image in them .* 2 folders inside those of the classes .*'train/cat'"):
        len(ImageFolders(folder))
    one = "should hold one folder for each class, and has none"
    for names, reason in (
        ((), "is no folder"),
        (("@eaDir/1.jpg",), f"{one}$"),
        (("n01440764.tar", "n01443537.tar", ".DS_Store"), rf"{one}: it has 2 .tar \(such as 'n01440764.tar'\)"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=reason):
            len(ImageFolders(made(tmp_path / f"g{len(names)}", *names)))


def test_what_is_left_out_is_one_line():
    left = left_out.LeftOut()
    for number in range(20):
        left.add(f".{number}", "a\nb", number + 1)
    assert "\n" not in str(left) and str(left).startswith("20 .19 (such as 'a\\nb'), 19 .18")
    assert str(left).endswith("and 8 other kinds") and str(left_out.LeftOut.unpack(left.pack())) == str(left)


KAGGLE = """n01440764 tench, Tinca tinca
n02012849 crane
n03126707 crane
n03710637 maillot
n03710721 maillot, tank suit
"""
KNOWN = ["tench", "crane bird", "construction crane", "maillot tights", "maillot tank suit"]


@pytest.mark.parametrize(
    "text",
    [
        KAGGLE,
        "\ufeff" + KAGGLE.replace("\n", "\r\n"),
        KAGGLE.replace(" ", "\t", 1).replace("\nn", "\n\nn"),
        "n01440764 449 tench\nn02012849 5 crane\nn03126707 6 crane\nn03710637 7 maillot\nn03710721 8 maillot\n",
        json.dumps({str(n): [line[:9], line[10:].split(",")[0]] for n, line in enumerate(KAGGLE.splitlines())}),
        json.dumps(formats.CLASSES),
    ],
    ids=["kaggle", "of windows", "tabs and empty lines", "devkit", "keras", "json"],
)
def test_files_of_class_names(tmp_path, text):
    folder, _ = formats.make_imagenet(tmp_path, each=1)
    (tmp_path / "names").write_bytes(text.encode())
    classes = ImageFolders(folder, names=tmp_path / "names").classes
    assert [c["id"] for c in classes] == sorted(formats.CLASSES) and [c["name"] for c in classes] == KNOWN


def test_files_that_name_no_classes_are_refused(tmp_path):
    folder, _ = formats.make_imagenet(tmp_path, each=1)
    for text, reason in (
        ("tench\ngreat white shark\n", "does not name classes"),
        ("", "does not name classes"),
        ("\xff\xff", "does not name classes"),
        ("\xff\xfe", "is UTF-16 text: save it as UTF-8"),
        (KAGGLE + "n01440764 fox\n", "names classes twice: n01440764"),
        ("# names of ImageNet\n" + KAGGLE, r"line 1 of '.*names' begins with #: take comments away"),
        (KAGGLE + "\n #comment\n", r"line 7 of '.*names' begins with #"),
        ("## 1\n#tag hashtag\n" + KAGGLE, r"line 1 of '.*names' begins with #"),
        (KAGGLE.replace("n01440764", "n01440765"), "does not name 1 classes of the data: n01440764"),
        ('{"0": ["n01440764", 7]}', "does not name classes"),
    ):
        (tmp_path / "names").write_bytes(text.encode("latin-1"))
        with pytest.raises(ValueError, match=reason):
            len(ImageFolders(folder, names=tmp_path / "names"))


def test_a_folder_that_was_made_anew_with_its_old_time_is_read_anew(tmp_path):
    """As archives and copies set the time of a folder."""
    for names in (["cat/1.jpg", "dog/1.jpg"], ["cat/1.jpg", "cat/2.jpg", "dog/1.jpg"]):
        shutil.rmtree(tmp_path / "f", ignore_errors=True)
        folder = made(tmp_path / "f", *names)
        for name in ("cat", "dog"):
            os.utime(folder / name, (10**9, 10**9))
        assert [name for name, _ in rows(ImageFolders(folder))] == names


def test_links_to_another_class_are_told(tmp_path, caplog):
    folder = made(tmp_path / "f", "cat/1.jpg", "dog/1.jpg")
    (folder / "hound").symlink_to("dog")
    assert rows(ImageFolders(folder)) == [("cat/1.jpg", 0), ("dog/1.jpg", 1), ("hound/1.jpg", 2)]
    (line,) = [r.getMessage() for r in caplog.records]
    assert line == f"{folder}: folders of classes that are the same folder: dog = hound"
