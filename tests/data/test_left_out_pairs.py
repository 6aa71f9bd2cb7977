"""Images with text files beside them: ordinary names are read, and every file that is left out is told."""

import logging
import os
import tarfile

import pytest
from etils import epath

from src.data.sources.captions import Captions
from src.data.sources.ultrachat import UltraChat
from src.data.sources.webdataset import WebDataset
from src.data.told_once import is_for_tests
from tests.helpers import formats

READ = ("#1.jpg", "@2.png", "$3.JPG", "__4.webp", "a/#5.png", "a.b/6.v2.gif", "_7.png", "sub/@8.jpeg")
LEFT = ("#tag/1.png", "__x/2.png", ".hid/3.png", "a/@new/4.png")
SYSTEMS = ("@eaDir/1.jpg", "__MACOSX/._2.jpg", "lost+found/3.jpg")


def made(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"?")
        if not name.lower().endswith((".txt", ".json")):
            path.with_suffix(".txt").write_text(f"text of {name}")
    return folder


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


@pytest.mark.parametrize("remote", [False, True])
def test_marks_in_front_of_names_of_files_are_part_of_the_name(tmp_path, bucket, caplog, remote):
    folder = epath.Path("gs://b/f") if remote else tmp_path / "f"
    source = Captions(made(folder, *READ, *SYSTEMS))
    found = {source[i].where: source[i]["caption"] for i in range(len(source))}
    assert found == {name: f"text of {name}" for name in READ}
    assert told(caplog) == []


def test_what_is_left_out_is_told_at_every_start(tmp_path, caplog):
    folder = made(tmp_path / "f", "1.png", *LEFT, *SYSTEMS, ".4.png")
    for name in ("5.tif", "6.TIFF", "7.tif", "8.heic", "9.json", "README", ".DS_Store"):
        (folder / name).write_bytes(b"?")
    os.symlink(made(tmp_path / "other", "1.png"), folder / "linked")
    for _ in range(2):
        caplog.clear()
        source = Captions(folder)
        assert [source[i]["caption"] for i in range(len(source))] == ["text of 1.png"]
        (line,) = told(caplog)
        assert "13 files are left out: 4 folders whose names begin as those of systems do" in line
        assert "2 .tif (such as '5.tif')" in line and "1 links to folders (such as 'linked')" in line
        for part in ("1 .tiff", "1 .heic", "1 .json", "1 without an ending", "1 .png (hidden)", "1 .txt (hidden)"):
            assert part in line


def test_folders_of_a_store_that_are_left_out_are_told(bucket, caplog):
    source = Captions(made(epath.Path("gs://b/f"), "a/1.png", *LEFT, *SYSTEMS, "2.tif"))
    assert [source.files.where(i) for i in range(len(source))] == ["2.txt", "a/1.png"]
    (line,) = told(caplog)
    assert "5 files are left out: 4 folders whose names begin as those of systems do" in line and "1 .tif" in line


def test_a_folder_without_pairs_is_refused_with_what_it_has(tmp_path):
    folder = made(tmp_path / "f", "#tag/1.png")
    (folder / "2.tif").write_bytes(b"?")
    with pytest.raises(FileNotFoundError, match=r"beside each a\.png \(it has 1 folders .*'#tag'.*1 \.tif"):
        len(Captions(folder))
    with pytest.raises(FileNotFoundError, match=r"beside each a\.png$"):
        len(Captions(tmp_path / "none"))


def test_files_that_are_named_for_tests_are_told_where_others_are_read(tmp_path, caplog):
    chat, image = '{"data": ["a", "b"]}\n', formats.encoded(formats.picture(0))
    for name in ("train", "contest", "val_2"):
        (tmp_path / "chats" / name).mkdir(parents=True)
        (tmp_path / f"chats/{name}/{name}.jsonl").write_text(chat)
        (tmp_path / f"chats/{name}.jsonl").write_text(chat)
        (tmp_path / "pairs" / name).mkdir(parents=True)
        (tmp_path / f"pairs/{name}/test.txt").write_text("a test")
        (tmp_path / f"pairs/{name}/test.png").write_bytes(image)
        (tmp_path / "tars").mkdir(exist_ok=True)
        with tarfile.open(tmp_path / f"tars/{name}.tar", "w") as archive:
            formats.add_file(archive, "1.jpg", image)
            formats.add_file(archive, "1.txt", b"a")
        with tarfile.open(tmp_path / "folders.tar", "a") as archive:
            formats.add_file(archive, f"{name}/1.jpg", image)
            formats.add_file(archive, f"{name}/1.txt", b"a")

    def said(source):
        caplog.clear()
        assert len(source)
        return [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]

    end = "files that are read are named for tests, such as"
    (told,) = said(Captions(tmp_path / "pairs"))
    assert f"2 of 6 {end} 'val_2'" in told
    (told,) = said(WebDataset(tmp_path / "tars"))
    assert f"1 of 3 {end} 'val_2.tar'" in told
    assert f"1 of 3 {end} 'val_2.jsonl'" in said(UltraChat(tmp_path / "chats"))[0]
    (tmp_path / "one").mkdir()
    (tmp_path / "folders.tar").rename(tmp_path / "one/a.tar")
    (told,) = said(WebDataset(tmp_path / "one"))
    assert "1 of 3 examples that are read are named for tests, such as 'a.tar val_2/1.jpg'" in told
    names = ("held-out.jsonl", "held_out", "devset", "test2017", "evaluation", "valley", "latest", "testimony")
    assert [is_for_tests(name) for name in names] == [True] * 4 + [False] * 4
    # of folders some of whose files are read, and of files for tests alone, nothing is told
    (told,) = said(UltraChat(tmp_path / "chats", names="train/*.jsonl"))
    assert "5 files are left out: 3 .jsonl (such as 'contest.jsonl'), 2 folders (such as 'contest')" in told
    assert not [line for line in said(UltraChat(tmp_path / "chats", names="val*.jsonl")) if "for tests" in line]
