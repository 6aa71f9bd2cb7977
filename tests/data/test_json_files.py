"""Files of a folder of chats: endings in capitals are read, others are told once; line breaks of any system; hints."""

import json
import logging
import os

import pytest

from src.data.example import BadRow
from src.data.files import json_lines
from src.data.files.json_lines import line_ends
from src.data.sources.captions import Captions
from src.data.sources.llava import Llava
from src.data.sources.ultrachat import UltraChat
from tests.helpers.rows import read_in_pieces

ROW = json.dumps({"data": ["a", "b"]})


def made(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data.encode())
    return folder


def told(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def test_endings_in_capitals_are_read_and_other_files_are_told_in_one_line(tmp_path, caplog):
    files = {"a.jsonl": ROW, "B.JSONL": ROW, "c.Jsonl": ROW, "._a.jsonl": "?", ".DS_Store": "?"}
    source = UltraChat(made(tmp_path / "c", **files))
    assert [source[i].where for i in range(len(source))] == ["B.JSONL line 1", "a.jsonl line 1", "c.Jsonl line 1"]
    assert told(caplog) == []
    more = {"d.jsonl.gz": "?", "e.jsonl.gz": "?", "f.json": ROW, ".g.jsonl": ROW, "h.jsonl.tmp": ROW, "README": "?"}
    folder = made(tmp_path / "c", **more)
    made(folder / "sub", **{"x.jsonl": ROW})
    for _ in range(2):
        caplog.clear()
        assert len(UltraChat(folder)) == 3
        (line,) = told(caplog)
        assert "7 files are left out: 2 .gz (such as 'd.jsonl.gz')" in line
        for part in ("1 .json ", "1 .jsonl (hidden)", "1 .tmp", "1 without an ending", "1 folders (such as 'sub')"):
            assert part in line
    caplog.clear()
    assert len(UltraChat(made(tmp_path / "l", **{"a.JSON": f"[{ROW}, {ROW}]"}))) == 2
    (tmp_path / "l.JSONL").write_text(ROW)
    assert len(Llava(tmp_path / "l.JSONL", tmp_path)) == 1 and told(caplog) == []


def test_empty_files_and_lines_of_zeros_are_no_silence(tmp_path, caplog):
    folder = made(tmp_path / "c", **{"a.jsonl": "", "b.jsonl": f"{ROW}\n\0\0\0\n \t\r\n{ROW}\n", "c.jsonl": "\n \n"})
    source = UltraChat(folder)
    assert len(source) == 3 and [source[n].where for n in (0, 2)] == ["b.jsonl line 1", "b.jsonl line 4"]
    with pytest.raises(BadRow, match=r"b\.jsonl line 2: the line is not JSON"):
        _ = source[1]
    assert "2 files are left out: 2 files without a row (such as 'a.jsonl')" in told(caplog)[0]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_pipes_and_devices_are_not_opened(tmp_path, name):
    os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=rf"{name}' is not a plain file: give one, or remove it"):
        len(UltraChat(tmp_path))
    (tmp_path / "captions.jsonl").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"captions\.jsonl' is not a plain file"):
        len(Captions(tmp_path))
    with pytest.raises(ValueError, match=rf"{name}' is not a plain file"):
        len(Llava(tmp_path / name, tmp_path))


def test_a_folder_without_chats_is_refused_with_what_it_has(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"has no \*\.jsonl or \*\.json: .* \(it has 1 \.xz \(such as 'a\.jsonl"
    ):
        len(UltraChat(made(tmp_path / "c", **{"a.jsonl.xz": "?"})))
    for name in ("none", "c/a.jsonl.xz"):  # no folder, and a file in the place of one
        with pytest.raises(FileNotFoundError, match=rf"{name}' has no \*\.jsonl or \*\.json"):
            len(UltraChat(tmp_path / name))


def test_names_may_be_those_of_folders_below(tmp_path):
    for name in ("x", "y"):
        (tmp_path / name).mkdir()
        made(tmp_path / name, **{f"{name}.jsonl": ROW})
    assert len(UltraChat(tmp_path, names="*/*.jsonl")) == 2


def test_files_of_a_store_are_chosen_alike(bucket, caplog):
    bucket.pipe({"gs://b/c/A.JSONL": ROW.encode(), "gs://b/c/b.jsonl.gz": b"?", "gs://b/c/sub/x.jsonl": b"?"})
    assert len(UltraChat("gs://b/c")) == 1
    assert "1 .gz (such as 'b.jsonl.gz')" in told(caplog)[0] and "'sub'" in told(caplog)[0]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("block", [1, 2, 3, 1000])
def test_line_breaks_of_any_system_end_lines(tmp_path, end, block, monkeypatch):
    read_in_pieces(monkeypatch, json_lines, block)
    text = end.join(["{}", "", " ", "[1]", "{2}", ""])
    for data in (text, text.rstrip(), text + end):
        (tmp_path / "a").write_bytes(data.encode())
        found = line_ends(tmp_path / "a").tolist()
        assert [number for _, number in found] == [1, 4, 5]
        starts = [0, *(place for place, _ in found)]
        lines = [data.encode()[a:b].strip() for a, (b, _) in zip(starts, found, strict=False)]
        assert lines == [b"{}", b"[1]", b"{2}"]


def test_rows_between_returns_and_mixed_breaks(tmp_path):
    rows = [json.dumps({"data": [str(i), "b"]}) for i in range(4)]
    source = UltraChat(made(tmp_path / "c", **{"a.jsonl": f"{rows[0]}\r{rows[1]}\n{rows[2]}\r\n\r\r{rows[3]}"}))
    assert [(e.where, e["turns"][0]) for e in map(source.__getitem__, range(len(source)))] == [
        (f"a.jsonl line {line}", str(i)) for i, line in enumerate((1, 2, 3, 6))
    ]


@pytest.mark.parametrize("name", ["a.jsonl", "dataset_info.json"])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        (json.dumps({"data": ["a", "b"]}, indent=1), "object over"),
        (json.dumps([{"data": ["a", "b"]}] * 2, indent=1), r"list over .*, or call the file \*\.json"),
        (f"[{ROW},\n{ROW}]\n", r"list over .*, or call the file \*\.json"),
    ],
)
def test_one_value_over_several_lines_is_one_hint(tmp_path, name, data, what):
    folder = made(tmp_path / "c", **{name: "\ufeff\n" + data})
    if name.endswith(".json") and what.startswith("list"):
        assert len(UltraChat(folder)) == 2
        return
    with pytest.raises(ValueError, match=rf"^'.*{name}' is one JSON {what}"):
        len(UltraChat(folder))


def test_a_list_in_one_line_and_folders_called_as_files(tmp_path):
    with pytest.raises(BadRow, match=r"not a JSON object \(it is a list: write .*, or call the file \*\.json"):
        UltraChat(made(tmp_path / "c", **{"a.jsonl": f"[{ROW}]"}))[0]
    for name, source in (("train.jsonl", UltraChat), ("train.json", UltraChat), ("captions.jsonl", Captions)):
        (tmp_path / name / name).mkdir(parents=True)
        with pytest.raises(ValueError, match=rf"{name}' is a folder and should be a file"):
            len(source(tmp_path / name))
