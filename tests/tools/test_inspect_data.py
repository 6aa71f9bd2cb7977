"""What a path holds is found, its bad rows are told, and the printed lines are those of a config that builds."""

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import common, digits
from src.build import build_system
from src.common.lookup import build
from src.data.task import SourceTask
from src.tools import inspect_data
from tests.helpers import formats
from tests.helpers.fields import table

CHAT = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}


def png(number=0):
    return formats.encoded(formats.picture(number), "PNG")


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def columns(path, **values):
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(values), path)


def make(folder):
    """Data of each kind, by name: the path that is inspected, the source that reads it, and its rows."""
    (folder / "chats").mkdir()
    (folder / "chats/a.jsonl").write_bytes(lines([CHAT, {"messages": []}, CHAT]))
    (folder / "packed").mkdir()
    with_tools = {"messages": [CHAT["messages"][0], CALL, {"role": "tool", "content": "1"}, CHAT["messages"][1]]}
    (folder / "packed/a.jsonl.gz").write_bytes(gzip.compress(lines([with_tools, CHAT])))
    columns(folder / "columns/data/train-0.parquet", messages=[CHAT["messages"]] * 3)
    image = [{"bytes": png(n), "path": None} for n in range(3)]
    columns(folder / "pets/data/train-0.parquet", image=image, text=["a", "", "c"])
    columns(folder / "pets/data/test-0.parquet", image=image, text=["a", "b", "c"])
    columns(folder / "kinds/train-0.parquet", img=image, label=[0, 1, 0])
    columns(folder / "texts/0.parquet", id=[1, 2], text=["one", "two"])
    formats.make_captions(folder / "captions")
    formats.make_tars(folder / "tars")
    for number, name in enumerate(("cat", "red_fox")):
        (folder / "classes" / name).mkdir(parents=True)
        (folder / "classes" / name / "0.png").write_bytes(png(number))
    return {
        "chats": ("chats", "ultrachat", 3),
        "one file of chats": ("chats/a.jsonl", "ultrachat", 3),
        "compressed chats with tools": ("packed", "ultrachat", 2),
        "chats in columns": ("columns", "ultrachat", 3),
        "images with captions in columns": ("pets", "parquet", 3),
        "one file of columns": ("pets/data/train-0.parquet", "parquet", 3),
        "images with labels in columns": ("kinds", "parquet", 3),
        "texts in columns": ("texts", "parquet", 2),
        "captions": ("captions", "captions", 6),
        "tar shards": ("tars", "webdataset", 8),
        "classes": ("classes", "image_folders", 2),
    }


@pytest.fixture
def printed(tmp_path, monkeypatch, capsys):
    """A config of digits whose tasks are all lines that are printed, and what was inspected."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config, made = digits.get_config("debug"), make(tmp_path)
    config.fields.text.codec = {"name": "text:Bytes"}
    config.tasks, config.eval.evaluators, config.batch, found = {}, {}, len(made), {}
    for kind, (path, source, rows) in made.items():
        assert inspect_data.main(["", str(tmp_path / path)]) == 0
        out, name = capsys.readouterr().out, kind.replace(" ", "_")
        assert f": {rows:,} rows, read by the source {source}\n" in out
        exec(out.partition("\n\n")[2], {"config": config, "common": common})
        with config.unlocked():
            config.tasks[name] = config.tasks.mine
            del config.tasks["mine"]
        found[name] = source, rows, out
    return config, found


def check(task, source, rows):
    assert task.source.__class__.__module__.endswith(source) and task.rows("train") == rows
    assert task.read("train", 0, np.full(task.draws, 0.9))


def test_the_printed_lines_make_rows_of_every_kind_of_data(printed):
    config, found = printed
    for name, (source, rows, _) in found.items():
        group = config.tasks[name].to_dict()
        parts = (build(f"data/{part}s", group[part]) for part in ("source", "template"))
        task = SourceTask(name, *parts, table(classes=2))
        check(task, source, rows)
        names = {segment.name for segment in task.layout.segments}
        assert {n for o in group["objectives"].values() for n in o["names"]} <= names
    assert config.fields.label.codec["count"] == 2
    assert "of the first 3 rows 1 is bad\n  a.jsonl line 2: the turns are no list of texts" in found["chats"][2]


@pytest.mark.faults
def test_the_printed_lines_are_those_of_a_config_that_builds(printed):
    config, found = printed
    system = build_system(config)
    for name, (source, rows, _) in found.items():
        check(system.tasks[name].task, source, rows)


def test_what_is_no_data_is_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    columns(tmp_path / "a/0.parquet", x=[1])
    (tmp_path / "b").mkdir()
    (tmp_path / "b/notes.md").write_text("?")
    (tmp_path / "c.jsonl").write_bytes(lines([{"url": "?"}]))
    for path, words in {
        "a": "has the columns x (int64): none is a chat",
        "b": "finds by itself (it has 'notes.md')",
        "b/notes.md": "is no file of rows",
        "c.jsonl": "has the keys 'url', and no chat",
        "none": "does not exist: give a folder",
    }.items():
        assert inspect_data.main(["", str(tmp_path / path)]) == 1
        (said,) = capsys.readouterr().err.strip().splitlines()
        assert words in said
    with pytest.raises(ValueError, match="no data are given"):
        inspect_data.main(["", "--traceback"])
