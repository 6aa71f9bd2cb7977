"""Files as programs of Windows and Python write them: byte order marks, UTF-16, line breaks, NaN, odd characters."""

import json
import tarfile

import pytest
from etils import epath

from src.codecs.text import Bytes, SentencePiece, train_sentencepiece
from src.data.example import BadRow
from src.data.files import json_lines
from src.data.files.json_lines import line_ends
from src.data.files.json_list import ListFile
from src.data.sources._classes import read_names
from src.data.sources.captions import Captions
from src.data.sources.documents import Documents
from src.data.sources.journeydb import JourneyDB
from src.data.sources.llava import Llava
from src.data.sources.ultrachat import UltraChat
from src.data.sources.webdataset import WebDataset
from src.data.task import SourceTask
from src.data.templates.chat import Chat
from src.data.templates.packed import Packed
from src.data.templates.text import Text
from tests.helpers import formats
from tests.helpers.fields import table
from tests.helpers.rows import read_in_pieces

MARK = b"\xef\xbb\xbf"
ROWS = {  # an example of each source of JSON, with and without a number that nobody reads
    "chats": {"data": ["Why?", "So."]},
    "captions": {"image": "a.jpg", "caption": "a cat"},
    "journeydb": {"img_path": "./a.jpg", "prompt": "a cat", "Task2": {"Caption": "a cat"}},
    "documents": {"parts": [{"text": "a cat"}]},
    "llava": {
        "image": "a.jpg",
        "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "So."}],
    },
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def source_of(kind, folder, data):
    """The source of one file with these bytes; those of `llava` are made a list."""
    folder.mkdir(exist_ok=True)
    (folder / "a.jpg").write_bytes(formats.encoded(formats.picture(0)))
    names = {"captions": "captions.jsonl", "documents": "documents.jsonl", "llava": "a.json"}
    path = folder / names.get(kind, "a.jsonl")
    path.write_bytes(data)
    made = {"chats": UltraChat, "captions": Captions, "documents": Documents}
    if kind in made:
        return made[kind](folder)
    return (JourneyDB if kind == "journeydb" else Llava)(path, folder)


def lines_of(kind, *rows):
    """The text of a file of rows."""
    if kind == "llava":
        return f"[{', '.join(map(json.dumps, rows))}]"
    return "".join(json.dumps(row) + "\n" for row in rows)


def examples(source):
    """Of each row its values, or where and why there are none."""
    found = []
    for number in range(len(source)):
        try:
            found.append({key: value for key, value in source[number].items() if key != "image"})
        except BadRow as flaw:
            found.append((flaw.where, flaw.reason, flaw.detail))
    return found


@pytest.mark.parametrize("kind", ROWS)
def test_rows_are_those_of_the_plain_file(kind, tmp_path):
    row = ROWS[kind]
    plain = lines_of(kind, row, row)
    good = examples(source_of(kind, tmp_path / "plain", plain.encode()))
    assert len(good) == 2 and all(isinstance(values, dict) for values in good)
    odd = {"similarity": float("nan"), "more": [float("inf"), {"least": -float("inf")}]}
    other = {
        "mark": MARK + plain.encode(),
        "mark and blank lines": MARK + b"\r\n\r\n" + plain.encode(),
        "returns": plain.replace("\n", "\r\n").encode(),
        "blank lines": plain.replace("\n", "\n\n \t\n").encode(),
        "nan": lines_of(kind, row | odd, row | odd).encode(),
        "1e999": plain.replace("{", '{"far": [1e999, -1e999], ', 1).encode(),
    }
    for name, data in other.items():
        found = examples(source_of(kind, tmp_path / name, data))
        assert [{k: v for k, v in e.items() if k not in ("similarity", "more", "far")} for e in found] == good, name
    for coding in ("utf-16", "utf-16-le", "utf-16-be", "utf-32"):
        with pytest.raises(ValueError, match=r"^'.*' is UTF-16 text: save it as UTF-8$"):
            len(source_of(kind, tmp_path / coding, plain.encode(coding)))


@pytest.mark.parametrize("kind", ROWS)
def test_keys_given_twice_and_halves_of_letters_are_named(kind, tmp_path):
    twice = '{"score": 1, "score": 2}'
    half = json.dumps({"author": "\ud83d"})
    text = f"[{twice}, {half}]" if kind == "llava" else f"{twice}\n\n{half}\n"
    found = examples(source_of(kind, tmp_path / "d", text.encode()))
    assert [reason for _, reason, _ in found] == ["the line is not JSON"] * 2
    assert "'score' is there twice" in found[0][2] and "ud83d' has half a surrogate pair" in found[1][2].replace(
        "\\", ""
    )
    assert found[1][0].endswith(" element 2" if kind == "llava" else " line 3")  # blank lines are counted, not read


def test_blank_lines_are_found_across_blocks(tmp_path, monkeypatch):
    data = b"\n \n{}\n\n\r\n[1]\n\t\n" * 3 + b"{}"
    (tmp_path / "a").write_bytes(data)
    want = line_ends(tmp_path / "a").tolist()
    lines, ends, size = data.split(b"\n"), [], 0
    for number, line in enumerate(lines, 1):
        size += len(line) + 1
        if line.strip():
            ends.append([min(size, len(data)), number])
    assert want == ends and len(ends) == 7
    read_in_pieces(monkeypatch, json_lines, 2)
    assert line_ends(tmp_path / "a").tolist() == want
    for empty in (b"", b"\n", b" \n \n"):
        (tmp_path / "a").write_bytes(empty)
        assert not len(line_ends(tmp_path / "a"))


def test_a_list_may_begin_with_a_mark_and_not_with_words(tmp_path):
    (tmp_path / "a.json").write_bytes(MARK + b" [ ]")
    assert len(ListFile(epath.Path(tmp_path / "a.json"))) == 0
    (tmp_path / "a.json").write_bytes(MARK + b"x []")
    with pytest.raises(ValueError, match=r"does not begin with \["):
        ListFile(epath.Path(tmp_path / "a.json"))


def test_members_of_tars_and_names_of_classes(tmp_path):
    image = formats.encoded(formats.picture(0))
    texts = {
        "a.txt": MARK + b"a cat\r\n",
        "b.json": MARK + b'{"caption": "a cat", "similarity": NaN}',
        "c.txt": "a cat".encode("utf-16"),
        "d.json": json.dumps({"caption": "a cat"}).encode("utf-16-le"),
        "e.txt": "a cat".encode("utf-16-le"),
    }
    with tarfile.open(tmp_path / "0.tar", "w") as archive:
        for name, data in texts.items():
            formats.add_file(archive, name.split(".")[0] + ".jpg", image)
            formats.add_file(archive, name, data)
    found = examples(WebDataset(tmp_path))
    assert [e["caption"] for e in found[:2]] == ["a cat"] * 2
    assert [reason for _, reason, _ in found[2:]] == ["the text is not UTF-8"] * 3
    (tmp_path / "names.json").write_bytes(MARK + b'{"n01440764": {"label": "tench", "share": NaN}}\r\n')
    assert read_names(tmp_path / "names.json") == {"n01440764": "tench"}
    (tmp_path / "names.json").write_bytes('{"n01440764": "tench"}'.encode("utf-16"))
    with pytest.raises(ValueError, match=r"names\.json' is UTF-16 text"):
        read_names(tmp_path / "names.json")


@pytest.fixture(scope="module", params=["bytes", "pieces", "pieces and bytes"])
def codec(request, tmp_path_factory):
    if request.param == "bytes":
        return Bytes()
    path, fallback = tmp_path_factory.mktemp("t") / "m", request.param == "pieces and bytes"
    train_sentencepiece(["a dog runs, what is it? abc"] * 5, 300 if fallback else 30, path, fallback)
    return SentencePiece(path)


@pytest.mark.parametrize("odd", ["\0", "a\0b", "a\ud83d", "\udcff", "\ufffe", "\ufeff", "\u2028", "\r"])
def test_any_character_is_a_token_or_a_bad_row(codec, odd):
    fields, known = table(codec), isinstance(codec, Bytes) or codec.vocab_size > 100
    turns = {"turns": ["a", "b" + odd]}
    for template, example in ((Chat(64), turns), (Packed(64), turns), (Text(64), {"text": "a" + odd})):
        task = SourceTask("t", [example], template, fields)
        half = any("\ud800" <= c <= "\udfff" for c in odd)
        try:
            task.rows("train")
            row = task.read("train", 0)
            (ids,) = (a for name, a in row.items() if name.endswith("/ids"))
            assert known and not half and odd in codec.decode(ids), type(template).__name__
        except BadRow as flaw:
            assert "cannot be encoded" in flaw.reason and (half or not known), str(flaw)
        if isinstance(template, Text):
            try:
                task.prompt([{"prompt": "a" + odd}])
                assert known and not half
            except ValueError as error:  # as the command line gives bytes that are no text
                assert "prompt 0" in str(error) and "cannot be encoded" in str(error) and (half or not known)
