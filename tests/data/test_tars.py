"""Archives as tools write them: every example is read or told, whatever format and names it has."""

import io
import os
import shutil
import subprocess
import tarfile

import pytest

from src.data.example import BadRow
from src.data.sources.webdataset import WebDataset
from tests.helpers import formats

JPEG = formats.encoded(formats.picture(0))
LONG = "deep/" * 30 + "x" * 90
# name of an example in the archive -> its caption
NAMES = {
    "1": "one", "a/2": "two", "a b/ü 水": "words", "v1.0/3": "folder with a dot", f"{LONG}": "long",
    "p/a\\_b_2": "backslash", "C:\\x": "drive", "-x": "option", "~/y": "home", "quote'\"": "quotes", "tab\tx": "tab",
    "caf\udce9": "not UTF-8",
    "IMG.2021.01": "dots", "IMG.2021.02": "dots again", "z/7.5..8": "numbers",
}  # fmt: skip
SYSTEMS = ("._1.jpg", "a/._2.txt", "__MACOSX/a/._2.jpg", "__MACOSX/1.jpg", "@eaDir/1.jpg/SYNO_M.jpg", ".DS_Store")
SYSTEMS += ("Thumbs.db", "a/.ipynb_checkpoints/2.jpg", "lost+found/1.jpg")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def written(folder, members):
    """The files of an archive in a folder."""
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def pairs(names=NAMES, ending="jpg", text="txt"):
    return {f"{n}.{e}": d for n, t in names.items() for e, d in ((ending, JPEG), (text, t.encode()))}


def archive(path, members, kind=tarfile.GNU_FORMAT):
    """An archive that Python writes; a member may be a TarInfo instead of bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as file:
        for name, data in members.items():
            entry = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo(name)
            entry.size = len(data) if isinstance(data, bytes) else 0
            file.addfile(entry, io.BytesIO(data) if isinstance(data, bytes) else None)
    return path.parent


def captions(folder):
    """The captions of all examples, whose images are whole, and what is said of bad rows."""
    source, good, told = WebDataset(folder), [], []
    for number in range(len(source)):
        try:
            example = source[number]
            assert example["image"] == JPEG
            good.append(example["caption"])
        except BadRow as flaw:
            told.append(str(flaw))
    return good, told


def link(name, target, kind=tarfile.LNKTYPE):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("prefix", ["", "./", "top/"])
def test_python_archives(tmp_path, kind, prefix):
    members = pairs({n: t for n, t in NAMES.items() if kind != tarfile.USTAR_FORMAT or n != LONG})
    files = dict.fromkeys(SYSTEMS, b"of a system")
    mixed = dict(kv for pair in zip(members.items(), [*files.items()] * 9, strict=False) for kv in pair) | members
    folder = archive(tmp_path / "t/0.tar", {prefix + name: data for name, data in mixed.items()}, kind)
    assert captions(folder) == ([data.decode() for name, data in members.items() if name.endswith("txt")], [])


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
@pytest.mark.parametrize("kind", ["v7", "oldgnu", "gnu", "ustar", "posix"])
def test_archives_of_gnu_tar(tmp_path, kind):
    kept = {n: t for n, t in NAMES.items() if kind not in ("v7", "ustar") or n != LONG}
    written(tmp_path / "files", pairs(kept) | dict.fromkeys(SYSTEMS, b"of a system"))
    (tmp_path / "t").mkdir()
    command = ["tar", f"--format={kind}", "--sort=name", "-C", tmp_path / "files", "-cf", tmp_path / "t/0.TAR", "."]
    subprocess.run(command, check=True, env=os.environ | {"LC_ALL": "C.UTF-8"})
    good, told = captions(tmp_path / "t")
    assert sorted(good) == sorted(kept.values()) and not told


@pytest.mark.skipif(not shutil.which("git"), reason="needs git")
def test_archives_of_git(tmp_path):
    written(tmp_path / "files", pairs())
    git = ["git", "-C", tmp_path / "files", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x", "--no-gpg-sign"]):
        subprocess.run([*git, *command], check=True, capture_output=True)
    (tmp_path / "t").mkdir()
    subprocess.run([*git, "archive", "--format=tar", "-o", tmp_path / "t/0.tar", "HEAD"], check=True)
    good, told = captions(tmp_path / "t")
    assert sorted(good) == sorted(NAMES.values()) and not told


PERL = "use Archive::Tar; my $out = shift; Archive::Tar->create_archive($out, undef, @ARGV) or die"


@pytest.mark.skipif(
    not shutil.which("perl") or subprocess.run(["perl", "-MArchive::Tar", "-e", "1"], capture_output=True).returncode,
    reason="needs Archive::Tar of Perl",
)
def test_archives_of_perl(tmp_path):
    members = pairs({"1": "one", "a/2": "two", "IMG.2021.01": "dots", "v1.0/3": "folder with a dot"})
    written(tmp_path / "files", members)
    (tmp_path / "t").mkdir()
    subprocess.run(["perl", "-e", PERL, tmp_path / "t/0.tar", *members], check=True, cwd=tmp_path / "files")
    assert captions(tmp_path / "t") == (["one", "two", "dots", "folder with a dot"], [])


def test_endings_in_capitals_and_of_other_formats(tmp_path, caplog):
    members = {"1.JPG": JPEG, "1.TXT": b"one", "2.Jpeg": JPEG, "2.JSON": b'{"caption": "two"}', "3.jfif": JPEG}
    members |= {
        "3.txt": b"three",
        "4.heic": b"?",
        "4.txt": b"four",
        "5.tiff": b"?",
        "6.tiff": b"?",
        "7": b"",
        ".8.jpg": b"",
    }
    for _ in range(2):  # from the cache, too
        caplog.clear()
        good, told = captions(archive(tmp_path / "t/0.tar", members))
        assert good == ["one", "two", "three"] and told == ["0.tar 4.txt: the image is missing"]
        assert "5 files are left out: 2 .tiff (such as '5.tiff')" in caplog.text
        assert all(part in caplog.text for part in ("1 .heic", "1 without an ending", "1 .jpg (hidden)"))


def test_pairs_of_an_archive_without_order(tmp_path, caplog):
    """`tar` and others store a folder in the order in which the disk has it."""
    texts = {"a/1": "one", "a/2": "two", "b/1": "another one", "v1.0/3": "folder", "IMG.2021.01": "dots"}
    members = pairs(texts)
    apart = [name for name in members if name.endswith("txt")] + [name for name in members if name.endswith("jpg")]
    whole = {"5.jpg": JPEG, "5.txt": b"five"}  # as ever, behind each other
    mixed = {name: members[name] for name in apart} | whole | {"6.a.jpg": JPEG, "7.jpg": JPEG, "8.txt": b"eight"}
    good, told = captions(archive(tmp_path / "t/0.tar", mixed))
    assert good == [*texts.values(), "five"]
    assert told == ["0.tar 7.jpg: there is no caption", "0.tar 8.txt: the image is missing"]
    assert "1 with more than one ending (such as '6.a.jpg')" in caplog.text


def test_an_image_a_text_and_a_json_file_may_lie_apart(tmp_path, caplog):
    """Sets of images from the web have a JSON file for each; neither GNU tar nor bsdtar sorts a folder by itself."""
    texts = dict(zip("1234", ("one", "two", "three", "four"), strict=True))
    members = pairs(texts) | {f"{n}.json": b'{"caption": "of the side"}' for n in "123456"} | {"5.jpg": JPEG}
    ending = {"j": "jpg", "t": "txt", "s": "json"}
    order = [f"{n}.{ending[e]}" for n, e in zip("121212334453465", "tsjtsjjtjsjstss", strict=True)]
    good, told = captions(archive(tmp_path / "t/0.tar", {name: members[name] for name in order}))
    assert good == [*texts.values(), "of the side"] and told == ["0.tar 6.json: the image is missing"]
    assert "left out" not in caplog.text


def test_an_ambiguous_name_is_no_pair(tmp_path):
    members = [("1.txt", b"one"), ("2.txt", b"two"), ("1.jpg", JPEG), ("2.jpg", JPEG), ("3.txt", b""), ("1.jpg", JPEG)]
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        for name, data in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            file.addfile(entry, io.BytesIO(data))
    good, told = captions(tmp_path)
    assert good == ["two"] and "0.tar 1.txt: the image is missing" in told
    assert told.count("0.tar 1.jpg: there is no caption") == 2


def test_a_name_that_is_there_again_is_told(tmp_path, caplog):
    """As `tar -r` and `tar -u` put a changed pair behind the old one."""
    (tmp_path / "t").mkdir()
    folder = written(tmp_path / "f", pairs({"1": "old", "2": "two"}))
    command = ["tar", "--sort=name", "-C", str(folder), "-f", str(tmp_path / "t/0.tar")]
    subprocess.run([*command, "-c", "."], check=True)
    assert captions(tmp_path / "t") == (["old", "two"], []) and not caplog.records
    (folder / "1.txt").write_bytes(b"new")
    subprocess.run([*command, "-r", "./1.jpg", "./1.txt"], check=True)
    for _ in range(2):  # the second time of the cache
        caplog.clear()
        assert captions(tmp_path / "t") == (["old", "two", "new"], [])
        (line,) = [r.getMessage() for r in caplog.records]
        assert "1 examples have a name that is there before in their archive, such as '0.tar 1.jpg'" in line


def test_incremental_archives_have_times_where_others_have_names(tmp_path, caplog):
    folder = written(tmp_path / "f", pairs({"1": "one", "a/2": "two"}))
    os.link(folder / "1.jpg", folder / "3.jpg")
    (folder / "3.txt").write_bytes(b"three")
    for number, path in enumerate(sorted(folder.rglob("*.*"))):
        os.utime(path, (10**9 + number, 10**9))  # read at other times
    (tmp_path / "t").mkdir()
    command = ["tar", "--sort=name", "-g", str(tmp_path / "snap"), "-C", str(folder), "-cf", str(tmp_path / "t/0.tar")]
    subprocess.run([*command, "."], check=True)
    assert captions(tmp_path / "t") == (["one", "three", "two"], []) and not caplog.records
    assert WebDataset(tmp_path / "t")[2].where == "0.tar a/2.jpg"


def test_captions_of_text_files_and_json(tmp_path):
    texts = {
        "1.txt": b"\xef\xbb\xbfa red\r\npear\r\n",
        "2.json": b'{"text": "two"}',
        "3.json": b'{"caption": ["a", "b"]}',
    }
    texts |= {"4.json": b'{"caption": 7}', "5.json": b'["five"]', "6.json": b'{"caption": null, "text": "six"}'}
    members = {name: data for text, said in texts.items() for name, data in ((f"{text[0]}.jpg", JPEG), (text, said))}
    good, told = captions(archive(tmp_path / "t/0.tar", members))
    assert good == ["a red\npear", "two", ["a", "b"], 7, "six"]  # no text is refused by the template that wants one
    assert told == ["0.tar 5.jpg: the line is not a JSON object (it is a list)"]


def test_names_with_dots_are_pairs_where_no_name_is_without(tmp_path, caplog):
    members = pairs({"1": "one"}) | {"1.seg.png": JPEG, "1.seg.json": b"{}", "1.png": JPEG, "2.a.jpg": JPEG}
    members |= {"3.b.txt": b"x"} | pairs({"4.v1.0": "four"}, "webp", "json") | {"4.v1.0.json": b'{"caption": "four"}'}
    good, told = captions(archive(tmp_path / "t/0.tar", members))
    assert (good, told) == (["one", "four"], [])
    assert "4 with more than one ending (such as '1.seg.png')" in caplog.text
    assert "1 second images of an example (such as '1.png')" in caplog.text


def test_links_are_the_files_that_they_name(tmp_path, caplog):
    members = pairs({"a/1": "one"}) | {"a/2.jpg": link("a/2.jpg", "a/1.jpg"), "a/2.txt": b"two"}
    members |= {"b/3.jpg": link("b/3.jpg", "../a/1.jpg", tarfile.SYMTYPE), "b/3.txt": b"three", "b/4.txt": b"four"}
    members |= {
        "b/4.jpg": link("b/4.jpg", "/etc/passwd", tarfile.SYMTYPE),
        "b/5.jpg": link("b/5.jpg", "", tarfile.FIFOTYPE),
    }
    members |= {"c/6.jpg": link("c/6.jpg", "later.jpg", tarfile.SYMTYPE), "c/6.txt": b"six", "c/later.jpg": JPEG}
    good, told = captions(archive(tmp_path / "t/0.tar", members))
    assert good == ["one", "two", "three", "six"]
    assert told == ["0.tar b/4.txt: the image is missing", "0.tar c/later.jpg: there is no caption"]
    assert "1 links to what is not in the archive (such as 'b/4.jpg'), 1 devices and pipes" in caplog.text


@pytest.mark.skipif(not shutil.which("tar"), reason="needs tar")
def test_hard_links_and_holes_of_gnu_tar(tmp_path, caplog):
    files = written(tmp_path / "files", pairs({"1": "one"}) | {"2.txt": b"two", "3.txt": b"three"})
    os.link(files / "1.jpg", files / "2.jpg")
    with open(files / "3.jpg", "wb") as hole:
        hole.truncate(1 << 20)
    (tmp_path / "t").mkdir()
    subprocess.run(["tar", "-S", "--sort=name", "-C", files, "-cf", tmp_path / "t/0.tar", "."], check=True)
    assert captions(tmp_path / "t") == (["one", "two"], ["0.tar 3.txt: the image is missing"])
    assert "1 sparse files (such as '3.jpg')" in caplog.text


def test_archives_in_archives_are_told(tmp_path, caplog):
    inner = (archive(tmp_path / "in/0.tar", pairs({"1": "one"})) / "0.tar").read_bytes()
    folder = archive(tmp_path / "t/0.tar", pairs({"2": "two"}) | {"a.tar": inner, "b.tar.gz": b"?", "c.zip": b"?"})
    assert captions(folder) == (["two"], [])
    assert all(part in caplog.text for part in ("3 files are left out", "1 .tar (such as 'a.tar')", "1 .gz", "1 .zip"))
    for members in ({"a.tar": inner, "b.tar": inner}, {"1.heic": b"?"}, {}):
        (tmp_path / "t/0.tar").unlink()
        folder = archive(tmp_path / "t/0.tar", members)
        with pytest.raises(ValueError, match=r"have no example, .*: they have (2 \.tar|1 \.heic|nothing)"):
            captions(folder)


def test_archives_behind_each_other_and_compressed_ones_are_refused_by_name(tmp_path):
    folder = archive(tmp_path / "t/0.tar", pairs({"1": "one"}))
    one = (folder / "0.tar").read_bytes()
    (folder / "._0.tar").write_bytes(b"of a system")
    assert captions(folder) == (["one"], [])
    for name in ("1.tar.gz", "1.TGZ", "1.tar.zst"):
        (folder / name).write_bytes(b"?")
        with pytest.raises(ValueError, match=rf"1 archives of .* cannot be read: {name} \(it is compressed\)"):
            captions(folder)
        (folder / name).unlink()
    end = 2 * tarfile.BLOCKSIZE
    for both in (one + one, one.rstrip(b"\0") + bytes(end) + one, one + b"\1", one[: -len(one) // 2] + one):
        (folder / "1.tar").write_bytes(both)
        with pytest.raises(ValueError, match=r"cannot be read: 1.tar"):
            captions(folder)
    for name in ("0.tar", "1.tar"):
        (folder / name).unlink()
    with pytest.raises(FileNotFoundError, match=r"has no \*.tar"):
        captions(folder)


def test_names_that_leave_the_folder_are_bad_rows_wherever_they_stand(tmp_path):
    odd = ("/2", "//3", "../4", "a/../5", "/b/6", "./../7")
    good, told = captions(archive(tmp_path / "t/0.tar", pairs({"1": "one"} | dict.fromkeys(odd, "odd") | {"2": "two"})))
    assert good == ["one", "two"]
    names = [n.removeprefix("./") for n in odd]
    assert told == [f"0.tar {n}.jpg: the name of the file is not allowed" for n in names]


def test_texts_given_twice_are_told(tmp_path, caplog):
    folder = archive(tmp_path / "t/0.tar", pairs({"1": "one"}) | {"1.TXT": b"two", "1.json": b"{}"})
    with tarfile.open(tmp_path / "t/0.tar", "a") as file:
        for name, data in (
            *pairs({"2": "two"}).items(),
            *pairs({"2": "again"}).items(),
            ("2.json", b"{}"),
            ("2.JSON", b""),
        ):
            formats.add_file(file, name, data)
    assert captions(folder) == (["one", "two"], [])
    assert (
        "2 second texts of an example (such as '1.TXT'), 1 second images of an example (such as '2.jpg')" in caplog.text
    )


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_bad_rows_have_the_names_of_their_files(tmp_path, kind):
    members = pairs({"1": "one"}) | {f"{LONG}.jpg": JPEG, "a/\u6c34.txt": b"of no image"}
    members |= {"b/3.jpg": link("b/3.jpg", "1.jpg"), "c/4.jpg": link("c/4.jpg", f"{LONG}.jpg")}
    good, told = captions(archive(tmp_path / "t/0.tar", members, kind))
    lacking = ": there is no caption"
    assert good == ["one"] and told == [
        f"0.tar {LONG}.jpg{lacking}", "0.tar a/\u6c34.txt: the image is missing", f"0.tar b/3.jpg{lacking}",
        f"0.tar c/4.jpg{lacking}",
    ]  # fmt: skip


def test_files_beside_the_archives_are_told(tmp_path, caplog):
    folder = archive(tmp_path / "t/0.tar", pairs({"1": "one"}) | {"2.heic": b"?"})
    archive(folder / "sub.tar/1.tar", pairs({"2": "two"}))
    written(
        folder, {"2.tar.part": b"?", "3.zip": b"?", "4.ZIP": b"?", ".5.tar": b"?", "._0.tar": b"?", ".DS_Store": b"?"}
    )
    for _ in range(2):
        caplog.clear()
        assert captions(folder) == (["one"], [])
        (line,) = [record.getMessage() for record in caplog.records]
        assert "6 files are left out: 2 .zip (such as '3.zip')" in line
        for part in ("1 folders (such as 'sub.tar')", "1 .part", "1 .tar (hidden)", "1 .heic (such as '2.heic')"):
            assert part in line
    (folder / "0.tar").unlink()
    with pytest.raises(FileNotFoundError, match=r"no \*\.tar: .* \(it has 2 \.zip .*1 folders"):
        captions(folder)


@pytest.mark.timeout(20)
def test_a_pipe_in_the_place_of_an_archive_is_not_opened(tmp_path, caplog):
    folder = archive(tmp_path / "t/0.tar", pairs({"1": "one"}))
    os.mkfifo(folder / "1.tar")
    assert captions(folder) == (["one"], []) and "1 devices and pipes (such as '1.tar')" in caplog.text


def test_empty_archives_and_entries_of_folders_are_told_for_what_they_are(tmp_path, caplog):
    dumped, volume = tarfile.TarInfo("a/"), tarfile.TarInfo("z.jpg")
    dumped.type, volume.type = b"D", b"M"  # of GNU tar: a folder of an incremental archive, a part of a file
    folder = archive(tmp_path / "t/0.tar", {"a/": dumped} | pairs({"a/1": "one"}))
    archive(folder / "1.tar", {})
    assert captions(folder) == (["one"], [])
    assert [r.getMessage() for r in caplog.records] == [
        f"{folder}: 1 files are left out: 1 archives without an example (such as '1.tar')"
    ]
    archive(folder / "1.tar", {"z.jpg": volume})
    assert captions(folder) == (["one"], []) and "1 members of an unknown kind (such as 'z.jpg')" in caplog.text
