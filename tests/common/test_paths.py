"""Names that strangers wrote stay below their folder, and files are read up to a bound."""

import os
import pwd
import re

import pytest
from etils import epath
from ml_collections import ConfigDict

from src.common.files.paths import all_at_home, at_home, inside, member, read_bounded, stem


@pytest.mark.parametrize("name", ["a.png", "a/b c/d.png", "./a", "folder/", "..a/b..", "12:30.png", "café/犬.png"])
def test_plain_names_pass(name, tmp_path):
    assert member(name) == name
    assert os.fspath(inside("gs://bucket/data", name)).startswith("gs://bucket/data/")
    assert os.fspath(inside(tmp_path, name)).startswith(f"{tmp_path}/")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/passwd", "absolute"),
        ("~/x", "absolute"),
        ("C:/x", "absolute"),
        ("c:x", "absolute"),
        ("gs://other/x", "absolute"),
        ("..", r"'\.\.'"),
        ("a/../../b", r"'\.\.'"),
        ("../b", r"'\.\.'"),
        ("a//b", "empty parts"),
        (".", "empty parts"),
        ("a\\..\\b", "backslash"),
        ("a\0b", "control character"),
        ("a\nb", "control character"),
        ("a\ud800b", "surrogate"),
        ("", "empty"),
        (None, "no text"),
        ("a" * 5000, "1024 characters"),
    ],
)
def test_names_that_leave_are_refused(name, reason, tmp_path):
    for folder in (tmp_path, "gs://bucket/data"):
        with pytest.raises(ValueError, match=f"refused because .*{reason}") as error:
            inside(folder, name)
        assert "\n" not in str(error.value) and len(str(error.value)) < 400
        str(error.value).encode()


def test_links_may_not_leave_but_the_hub_cache_works(tmp_path):
    folder, cache = tmp_path / "data", tmp_path / "models--x"
    for made in (folder / "sub", cache / "snapshots" / "rev", cache / "blobs"):
        made.mkdir(parents=True)
    (tmp_path / "secret").write_text("s")
    (folder / "real").write_text("r")
    (folder / "good").symlink_to("real")
    (folder / "bad").symlink_to(tmp_path / "secret")
    (folder / "up").symlink_to("..")
    (folder / "round").symlink_to("round")
    assert inside(folder, "good").read_text() == "r" and inside(folder, "sub/none")
    assert inside(folder / "sub" / "..", "real").read_text() == "r"  # the folder's own name is not in question
    (tmp_path / "data2").mkdir()
    (folder / "near").symlink_to(tmp_path / "data2")  # "data" begins the name of "data2"
    for name in ("bad", "up/secret", "near/x"):
        with pytest.raises(ValueError, match="is a link out of"):
            inside(folder, name)
    (cache / "blobs" / "abc").write_text("b")
    (cache / "snapshots" / "rev" / "model").symlink_to("../../blobs/abc")
    (cache / "snapshots" / "rev" / "bad").symlink_to("../../../secret")
    assert inside(cache / "snapshots" / "rev", "model").read_text() == "b"
    with pytest.raises(ValueError, match="is a link out of"):
        inside(cache / "snapshots" / "rev", "bad")


def test_reading_stops_at_the_bound(tmp_path, bucket):
    (tmp_path / "f").write_bytes(b"x" * 10)
    bucket.pipe("gs://b/f", b"x" * 10)
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    for path in (tmp_path / "f", "gs://b/f"):
        assert read_bounded(path, 10) == b"x" * 10
        with pytest.raises(ValueError, match="more than 9 bytes"):
            read_bounded(path, 9)
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)  # a hole: it has no room on the disk, and would have none in memory
    with pytest.raises(ValueError, match="more than 9 bytes"):
        read_bounded(tmp_path / "huge", 9)
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        with pytest.raises(ValueError, match="not a plain file"):
            read_bounded(path, 9)
    for path in (tmp_path / "none", "gs://b/none"):
        with pytest.raises(FileNotFoundError, match=r"the tokenizer .*none' does not exist"):
            read_bounded(path, 9, "tokenizer")
    with pytest.raises((ValueError, OSError), match="the file ") as error:
        read_bounded("a\0b", 9)
    assert "\n" not in str(error.value)
    bucket.down = True
    with pytest.raises(OSError, match="does not answer"):
        read_bounded("gs://b/f", 9)


def test_prompts_name_files_in_their_folder(tmp_path):
    assert stem("A handwritten three!") == "a-handwritten-three"
    for prompt in ("../../etc/passwd", "/etc/passwd", "..", "\0", "", "a\\..\\b", "gs://b/x", "x" * 5000, "三", "CON:"):
        assert (tmp_path / f"{stem(prompt)}.png").resolve().parent == tmp_path.resolve()
        assert member(stem(prompt)) and len(stem(prompt)) <= 60


def test_a_tilde_is_a_home_folder_at_the_beginning_alone(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/me")
    for path in ("", "$HOME/x", "./~/x", "a/~/b", "x~", "~ {} ~", "~5 of {}", "gs://b/~x", "/~"):
        assert at_home(path) == path
    assert (at_home("~"), at_home("~/"), at_home("~/a b/~")) == ("/home/me", "/home/me/", "/home/me/a b/~")
    root = pwd.getpwuid(0)
    assert at_home(f"~{root.pw_name}/x") == os.path.join(root.pw_dir, "x")
    with pytest.raises(ValueError, match=r"no user 'no-one' .*'~no-one/x' begins with: write ./~no-one for"):
        at_home("~no-one/x")


@pytest.mark.parametrize("kind", [dict, ConfigDict])
def test_every_path_of_a_config_may_begin_at_home(kind, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    codec = {"name": "text:Llama", "path": "~/t.model"}
    source = {"name": "llava", "annotations": "~/a.json", "images": epath.Path("~/i"), "held_out": 3, "x": None}
    source |= {"many": ("~/one", 2, "two"), "deep": [{"folder": "~/b"}], "rest": ("a", 1)}
    config = kind({"init_from": {"path": "~/w"}, "fields": {"t": {"codec": codec}}, "tasks": {"c": {"source": source}}})
    kept = config["tasks"]["c"]["source"]["rest"]
    all_at_home(config)
    found = config["tasks"]["c"]["source"]
    assert config["init_from"]["path"] == "/home/me/w" and config["fields"]["t"]["codec"]["path"] == "/home/me/t.model"
    assert (found["annotations"], os.fspath(found["images"])) == ("/home/me/a.json", "/home/me/i")
    assert found["many"] == ("/home/me/one", 2, "two") and found["deep"] == [{"folder": "/home/me/b"}]
    assert found["rest"] is kept and found["held_out"] == 3
    config["init_from"]["path"] = "~no-one/w"
    with pytest.raises(ValueError, match=r"^init_from.path: there is no user 'no-one'"):
        all_at_home(config)


PROMPTS = ["a handwritten three", "a-handwritten-three", "a handwritten, three", "一只猫", "一只狗"]
PROMPTS += [
    "قطة",
    "كلب",
    "🐱",
    "🐶",
    "👩‍🚀",
    "caf\u00e9",
    "caf",
    "cafe\u0301",
    "3 + 4",
    "3 - 4",
    "x" * 61,
    "x" * 62,
    "x" * 60,
]
PROMPTS += ["Ω", "ω", "a 猫 b", "a 狗 b", "half \udc80 a", "half \udc81 a", "..", "/", "", " "]


def test_each_text_has_a_file_name_of_its_own():
    names = [stem(text) for text in PROMPTS]
    assert len(set(names)) == len(PROMPTS), sorted(names)
    assert all(re.fullmatch(r"[a-z0-9-]{1,60}", name) for name in names), names
    assert len({stem(chr(0x4E00 + i)) for i in range(2000)}) == 2000
    assert [stem(text) for text in PROMPTS] == names, "the same again"


def test_a_plain_text_is_its_own_name():
    assert stem("a handwritten three") == "a-handwritten-three" and stem("class 3") == "class-3"
    assert stem("") == "sample" and stem("", "image") == "image"
    assert re.fullmatch(r"a-b-[0-9a-f]{8}", stem("a 猫 b")) and re.fullmatch(r"sample-[0-9a-f]{8}", stem("猫"))
