"""Chats with tools, compressed lines, and Parquet and Arrow files: the same rows as in plain lines; what is broken is a
bad row or refused by name."""

import gzip
import json

import pyarrow as pa
import pytest

from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.chat import Chat
from tests.helpers.fields import table
from tests.helpers.rows import build, words

ROWS = [
    {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So ü."}]},
    {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"instruction": "Add.", "input": "1 2", "output": "3"},
]
CALL = {"id": "1", "type": "function", "function": {"name": "sum", "arguments": '{"of": [1, 2]}'}}
TOOL = {"name": "sum", "parameters": {"type": "object"}}
WITH_TOOLS = {
    "tools": [{"type": "function", "function": TOOL}],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "1 + 2, twice?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "1", "content": "3"},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "3"}]},
        {"role": "assistant", "content": "3"},
    ],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(data):
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as file:
        file.write(data)
    return sink.getvalue().to_pybytes()


def examples(source):
    return [dict(source[n]) for n in range(len(source))]


def test_tools_are_text_with_the_loss_on_calls_and_not_on_what_they_answer(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(lines([WITH_TOOLS, ROWS[0]]))
    with pytest.raises(BadRow, match=r"'tools': put it into the text, .* source\.tools to hermes"):
        _ = UltraChat(tmp_path)[0]
    source = UltraChat(tmp_path, tools="hermes")
    task = SourceTask("t", source, Chat(1024), table(Bytes()))
    call = '<tool_call>\n{"name": "sum", "arguments": {"of": [1, 2]}}\n</tool_call>'
    said = words(Bytes(), build(task, "train", [0]).tokens["text"])
    answer = "<tool_response>\n3\n</tool_response>"
    assert said.startswith("<s>Be brief.\n\n# Tools\n\n") and json.dumps(WITH_TOOLS["tools"][0]) in said
    assert said.endswith(f"1 + 2, twice?[{call}\n{call}</s>]<s>{answer}\n{answer}[3</s>]")
    assert source[1]["turns"] == UltraChat(tmp_path)[1]["turns"]  # others are not changed
    share = {"tools": json.dumps([TOOL]), "conversations": [{"from": "human", "value": "1 + 2?"}]}
    share["conversations"] += [{"from": "function_call", "value": "{}"}, {"from": "observation", "value": "3"}]
    share["conversations"] += [{"from": "gpt", "value": "3"}]
    (tmp_path / "a.jsonl").write_bytes(lines([share, {"messages": [{"role": "assistant", "tool_calls": [{}]}]}]))
    again = UltraChat(tmp_path, tools="hermes")
    assert again[0]["turns"][1:] == ["<tool_call>\n{}\n</tool_call>", answer, "3"]
    with pytest.raises(BadRow, match=r"line 2 turn 1: a call of a tool has no name"):
        _ = again[1]
    with pytest.raises(ValueError, match=r"source\.tools='qwen' is unknown"):
        UltraChat(tmp_path, tools="qwen")


def test_compressed_lines_are_the_rows_of_plain_ones(tmp_path):
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain/a.jsonl").write_bytes(lines(ROWS))
    wanted = examples(UltraChat(tmp_path / "plain"))
    forms = {
        "a.jsonl.gz": gzip.compress(lines(ROWS[:1])) + gzip.compress(lines(ROWS[1:])),  # as pigz and cat write them
        "a.jsonl.zst": zstd(lines(ROWS[:1])) + zstd(lines(ROWS[1:])),
        "a.json.gz": gzip.compress(json.dumps(ROWS, indent=1).encode()),
    }
    for name, data in forms.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_bytes(data)
        source = UltraChat(folder)
        assert examples(source) == wanted and source[1].where.startswith(name)
        for broken in (data[: len(data) // 2], b"?" + data):
            (folder / name).write_bytes(broken)
            with pytest.raises(ValueError, match=rf"{name}' cannot be unpacked \(.*\): copy it again"):
                len(UltraChat(folder))
