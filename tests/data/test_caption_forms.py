"""Captions in four forms give the same rows; what is broken in one of them is a bad row, or refused by name."""

import json
import pickle

import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data import told_once
from src.data.example import BadRow
from src.data.sources.captions import Captions
from src.data.sources.documents import Documents
from src.data.sources.journeydb import JourneyDB
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.image_to_caption import ImageToCaption
from tests.helpers import formats
from tests.helpers.fields import table
from tests.helpers.rows import build, captions, words

SAID = ["two red pears", 'a "fox", asleep', "three\nlines\nof it", "a\0b ü 水"]
NAMES = ["a/0.png", "a/1.png", "b c/2.png", "3.png"]
CODEC = Bytes()


def quoted(text):
    return '"' + text.replace('"', '""') + '"'


def lines(image, text):
    return "".join(json.dumps({image: n, text: s}) + "\n" for n, s in zip(NAMES, SAID, strict=True)).encode()


def rows(separator, head):
    said = [separator.join((n, "7", quoted(s))) for n, s in zip(NAMES, SAID, strict=True)]
    return "\r\n".join([separator.join(head), *said, "", ""]).encode()


FORMS = {
    "captions.jsonl": lines("image", "caption"),
    "metadata.jsonl": lines("file_name", "text"),
    "metadata.csv": b"\xef\xbb\xbf" + rows(",", ("file_name", "id", "text")),
    "captions.tsv": rows("\t", ("filepath", " id ", "caption")),
    "": None,
}


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(NAMES):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(formats.encoded(formats.picture(number), "PNG"))
    return tmp_path


@pytest.mark.parametrize("name", FORMS)
def test_four_forms_are_the_same_captions(folder, name):
    if name:
        (folder / name).write_bytes(FORMS[name])
    else:
        for image, text in zip(NAMES, SAID, strict=True):
            (folder / image).with_suffix(".txt").write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n")
        for left in ("__MACOSX", ".cache", "@eaDir"):
            (folder / left).mkdir()
            (folder / left / "._0.txt").write_bytes(b"nothing")
        (folder / ".x.txt").write_bytes(b"nothing")
    source = Captions(folder)
    order = sorted(range(4), key=NAMES.__getitem__) if not name else range(4)
    assert captions(source) == [SAID[i] for i in order]
    data = SourceTask("t", pickle.loads(pickle.dumps(source)), ImageToCaption(32), table(CODEC, (8, 8, 3)))
    batch = build(data, "train", range(data.rows("train"))).tokens
    said = [words(CODEC, batch["text.caption"], row) for row in range(4)]
    assert said == [f"</i>[{SAID[i]}</s>]" for i in order] and batch["image"].valid.all()
    assert len({np.asarray(value).tobytes() for value in batch["image"].value}) == 4


def test_broken_rows_of_tables_are_named_and_no_other_is(folder):
    text = 'file_name,text\n3.png,a\n\n3.png,b,c\n3.png\n3.png,"two\nlines"\n3.png,"x" y\n'
    text += ",d\n../x.png,e\n3.png, \n3.png,z\n"
    (folder / "metadata.csv").write_text(text)
    source = Captions(folder)
    columns, name = "the row has another number of columns", "the name of the image is not allowed"
    line = "metadata.csv line"
    assert captions(source) == [
        "a", (f"{line} 4", columns), (f"{line} 5", columns), "two\nlines",
        (f"{line} 8", "the row is no row of a table"), (f"{line} 9", name), (f"{line} 10", name), " ", "z",
    ]  # fmt: skip
    data = SourceTask("t", source, ImageToCaption(32), table(CODEC, (8, 8, 3)))
    with pytest.raises(BadRow, match="line 11: the caption is empty"):
        data.read("train", 7)
    (folder / "metadata.csv").write_text('file_name,text\n3.png,a\n3.png,"never closed\n3.png,b\n')
    with pytest.raises(ValueError, match=r"^the quote in line 3 of '.*metadata\.csv' opens a field that is not closed"):
        len(Captions(folder))
    (folder / "metadata.csv").write_text('file_name,text\n3.png,a\n3.png,"cut')
    assert captions(Captions(folder)) == ["a", (f"{line} 3", "the row is no row of a table")]


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (rows(",", ("file_name", "id", "text")).decode().encode("utf-16"), "is UTF-16 text: save it as UTF-8"),
        (b"file_name,text\n3.png,\xff\n", r"is not UTF-8 \(byte 21\)"),
        (b"3.png,a red pear\n", "has the columns 3.png, a red pear and none with the images: .*file_name"),
        (b"url,text\nhttp://x,a\n", "has the columns url, text and none with the images"),
        (b"file_name,text,text\n", "begins with the columns file_name, text, text: .*each once"),
        (b"", "begins with the columns none"),
    ],
)
def test_tables_that_are_none_are_refused_at_the_start(folder, data, match):
    (folder / "metadata.csv").write_bytes(data)
    with pytest.raises(ValueError, match=rf"metadata\.csv' {match}"):
        len(Captions(folder))


def test_halves_of_pairs_are_bad_rows_and_folders_without_captions_name_the_forms(folder):
    with pytest.raises(FileNotFoundError, match=r"captions\.jsonl' does not exist: .*metadata\.csv.* an a\.txt beside"):
        len(Captions(folder))
    (folder / "a/0.txt").write_text("a pear")
    (folder / "b c/9.txt").write_text("of no image")
    (folder / "3.txt").write_bytes("a pear".encode("utf-16"))
    assert captions(Captions(folder)) == [
        ("3.txt", "the text is not UTF-8"),
        "a pear",
        ("a/1.png", "there is no caption"),
        ("b c/2.png", "there is no caption"),
        ("b c/9.txt", "the image is missing"),
    ]
    (folder.parent / "secret.txt").write_text("of nobody")
    (folder / "a/1.txt").symlink_to(folder.parent / "secret.txt")
    assert captions(Captions(folder))[2] == ("a/1.png", "the caption cannot be read")
    (folder / "captions.jsonl").write_text('{"url": "http://x", "caption": "a"}\n')
    with pytest.raises(BadRow, match=r"line 1: the row names no image \(its keys are 'url', 'caption'; write \{"):
        Captions(folder)[0]


def test_several_captions_of_an_image(folder, caplog, monkeypatch):
    monkeypatch.setattr(told_once, "_told", set())
    several = {"image": "3.png", "caption": ["one", "two"]}
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, [several, several | {"caption": {"en": "x"}}])))
    fields = table(CODEC, (8, 8, 3))
    drawn = SourceTask("t", Captions(folder), CaptionToImage(16, drop=0.0), fields)
    rows = build(drawn, "train", [0] * 4, np.array([[0.1, 0.9], [0.6, 0.9]] * 2)).tokens["text.prompt"]
    assert [words(CODEC, rows, row) for row in range(4)] == ["<s>one<i>", "<s>two<i>"] * 2
    with pytest.raises(BadRow, match=r"there is no caption \(it is {'en': 'x'}, no text\)"):
        drawn.read("train", 1, None)
    assert not [r for r in caplog.records if "told once" in r.getMessage()]
    first = build(SourceTask("t", Captions(folder), ImageToCaption(16), fields), "train", [0]).tokens
    assert words(CODEC, first["text.caption"]) == "</i>[one</s>]"
    assert "captions.jsonl line 1: of several texts under 'caption' only the first is learned" in caplog.text


def test_the_advice_about_a_list_can_be_followed(folder):
    """Of the files with captions no list is read, of JourneyDB's annotations one is."""
    for indent in (None, 1):
        rows = json.dumps(
            [{"image": n, "img_path": n, "caption": "x", "prompt": s} for n, s in zip(NAMES, SAID, strict=True)],
            indent=indent,
        )
        for name in ("captions.jsonl", "anno.jsonl", "anno.json"):
            (folder / name).write_text(rows)
        for source in (Captions(folder), JourneyDB(folder / "anno.jsonl", folder)):
            with pytest.raises((BadRow, ValueError), match=r"list.*write each element in a line") as error:
                source[0]
            assert ("*.json" in str(error.value)) == isinstance(source, JourneyDB)
        assert [JourneyDB(folder / "anno.json", folder)[row]["prompt"] for row in range(4)] == SAID


def test_texts_that_are_read_otherwise_are_told(folder, caplog, monkeypatch):
    """A second caption, a weight, lists and gaps that a program wrote as text, and what lines of JourneyDB hold."""
    monkeypatch.setattr(told_once, "_told", set())
    row = {"image": "3.png", "caption": "short", "text": "other"}
    rows = [
        row | {"text": "short", "file_name": "3.png"},
        row | {"text": ""},
        row,
        row | {"weight": 0, "file_name": "1.png"},
    ]
    rows += [{"image": "3.png", "caption": text} for text in ("[A] 'b'", "['a b', 'c']", '["a"]', "nan")]
    (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions(Captions(folder)) == [*["short"] * 4, "[A] 'b'", "['a b', 'c']", '["a"]', "nan"]
    anno = {"img_path": "3.png", "prompt": "a", "Task1": {"x": "y"}, "Task2": {"Caption": "b"}}
    rows = [anno, anno | {"negative_prompt": "bad hands", "caption": "c"}, anno | {"Task2": "b"}]
    (folder / "anno.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = JourneyDB(folder / "anno.jsonl", folder)
    assert [source[n].get("caption") for n in range(3)] == ["b", "b", None]
    named = "beside the caption is read where a template names it, alone"
    assert [r.getMessage().removesuffix(" (told once)") for r in caplog.records if "told once" in r.getMessage()] == [
        f"captions.jsonl line 3: the key 'text' {named}",
        "captions.jsonl line 4: the key 'weight' beside the caption is not read",
        f"captions.jsonl line 4: the key 'file_name' {named}",
        "captions.jsonl line 6: a caption in the form of a list is read as one text, with its brackets",
        "captions.jsonl line 8: the caption 'nan' is read as a text",
        "anno.jsonl line 2: the key 'negative_prompt' beside the prompt is not read",
        "anno.jsonl line 2: the key 'caption' beside the prompt is not read",
        "anno.jsonl line 3: the key 'Task2' beside the prompt is not read",
    ]


def test_what_rows_hold_beside_the_caption_is_told(folder, caplog, monkeypatch):
    """Further texts, which a template may name, and rows that are for tests by their own account."""
    monkeypatch.setattr(told_once, "_told", set())
    row = {"file_name": "3.png", "text": "a red pear", "id": "x7", "url": "https://x.org/3.png?a=1", "width": 8}
    rows = [row, row | {"caption_2": "two words", "crop": [0, 8], "split": "train"}, row | {"split": "Test"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows * 2)))
    assert captions(Captions(folder)) == ["a red pear"] * 6
    (folder / "documents.jsonl").write_text(json.dumps({"parts": [{"text": "a"}], "partition": "val"}))
    (folder / "anno.jsonl").write_text(json.dumps({"img_path": "3.png", "prompt": "a", "set": "dev"}))
    (folder / "chats").mkdir()
    (folder / "chats/a.jsonl").write_text(json.dumps({"data": ["a", "b"], "subset": "validation"}))
    for source in (Documents(folder), JourneyDB(folder / "anno.jsonl", folder), UltraChat(folder / "chats")):
        assert source[0]
    end = "is one like the others: put such rows elsewhere"
    assert [r.getMessage() for r in caplog.records if "told once" in r.getMessage()] == [
        f"{told} (told once)"
        for told in (
            "metadata.jsonl line 2: the key 'crop' beside the caption is not read",
            "metadata.jsonl line 2: the key 'caption_2' beside the caption is read where a template names it, alone",
            f"metadata.jsonl line 3: a row with split='Test' {end}",
            f"documents.jsonl line 1: a row with partition='val' {end}",
            f"anno.jsonl line 1: a row with set='dev' {end}",
            f"a.jsonl line 1: a row with subset='validation' {end}",
        )
    ]
