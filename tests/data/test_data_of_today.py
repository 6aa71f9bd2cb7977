"""Chats with tools, compressed lines, and Parquet and Arrow files: the same rows as in plain lines; what is broken is a
bad row or refused by name."""

import gzip
import json

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.codecs.text import Bytes
from src.data.example import BadRow
from src.data.pipeline.stream import Mixture
from src.data.prepare import kind_of
from src.data.sources.parquet import Parquet
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.chat import Chat
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.text import Text
from tests.helpers import formats
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


FEATURES = {"info": {"features": {"label": {"names": ["cat", "red_fox"], "_type": "ClassLabel"}}}}


def shard(first, rows=5, **changed):
    """A shard as Hugging Face writes it: images with their bytes, captions, classes and texts."""
    numbers = range(first, first + rows)
    columns = {
        "image": [{"bytes": formats.encoded(formats.picture(n), "PNG"), "path": f"{n}.png"} for n in numbers],
        "caption": [f"picture {n} ü" for n in numbers],
        "label": [n % 2 for n in numbers],
        "text": [f"text {n}" for n in numbers],
    }
    made = pa.table({name: column for name, column in (columns | changed).items() if column is not None})
    return made.replace_schema_metadata({"huggingface": json.dumps(FEATURES)})


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "set"
    (folder / "data").mkdir(parents=True)
    for number in range(3):
        path = folder / f"data/train-{number:05d}-of-00003.parquet"
        pq.write_table(shard(5 * number), path, row_group_size=2, write_page_checksum=True, compression="none")
    pq.write_table(shard(90), folder / "data/test-00000-of-00001.parquet")
    (folder / "README.md").write_text("a card")
    return folder


def test_shards_of_parquet_and_arrow_are_the_rows_that_were_written(folder, caplog):
    source = Parquet(folder, caption="caption", label="label")
    assert len(source) == 15 and [c["name"] for c in source.classes] == ["cat", "red fox"]
    assert "1 files of other splits (such as 'data/test-" in caplog.text and "1 .md" in caplog.text
    for number in np.random.default_rng(0).permutation(15).tolist():
        wanted = {"caption": f"picture {number} ü", "label": number % 2}
        assert dict(source[number]) == wanted | {"image": formats.encoded(formats.picture(number), "PNG")}
    assert source[7].where == "train-00001-of-00003.parquet row 3" and kind_of(source) == "classes"
    texts = Parquet(folder, text="text", split="test")
    assert [texts[n]["text"] for n in (0, 4)] == ["text 90", "text 94"] and kind_of(texts) == "documents"
    everything = Parquet(folder, text="text", pattern="data/*-00000-*")
    assert len(everything) == 10
    for name, begin in (("stream", pa.ipc.new_stream), ("file", pa.ipc.new_file)):
        place = folder / f"{name}/data-00000-of-00001.arrow"
        place.parent.mkdir()
        with begin(str(place), shard(0).schema) as writer:
            writer.write_table(shard(0), max_chunksize=2)
        arrow = Parquet(place.parent, caption="caption", label="label")
        assert examples(arrow) == [dict(source[n]) for n in range(5)] and arrow.classes == source.classes


def test_chats_in_columns_are_the_chats_of_lines(tmp_path):
    rows = [ROWS[0], {"messages": [*ROWS[0]["messages"], *ROWS[0]["messages"]]}]
    for name in ("lines", "columns"):
        (tmp_path / name).mkdir()
    (tmp_path / "lines/a.jsonl").write_bytes(lines(rows))
    for number, row in enumerate(rows):
        pq.write_table(pa.Table.from_pylist([row]), tmp_path / f"columns/{number}.parquet")
    source = UltraChat(tmp_path / "columns")
    assert examples(source) == examples(UltraChat(tmp_path / "lines")) and source[1].where == "1.parquet row 1"
    pq.write_table(pa.table({"messages": ["?"]}), tmp_path / "columns/2.parquet")
    with pytest.raises(ValueError, match=r"2\.parquet' has the column 'messages' as string, and 0\.parquet has it as"):
        len(UltraChat(tmp_path / "columns"))


def test_broken_files_are_refused_by_name_and_broken_groups_are_bad_rows(folder):
    third, second = (folder / f"data/train-0000{n}-of-00003.parquet" for n in (2, 1))
    whole = third.read_bytes()
    for changed, told in (
        ({"caption": [1, 2, 3, 4, 5]}, "has the column 'caption' as int64, and train-00000-of-00003.parquet has it as"),
        ({"caption": None}, "has no column 'caption': name one of 'image', 'label', 'text'"),
    ):
        pq.write_table(shard(10, **changed), third)
        with pytest.raises(ValueError, match=rf"train-00002-of-00003\.parquet' {told}"):
            len(Parquet(folder, caption="caption"))
    third.write_bytes(whole[:-100])
    with pytest.raises(
        ValueError, match=r"train-00002-of-00003\.parquet' is no whole Parquet or Arrow file \(.*: copy"
    ):
        len(Parquet(folder, caption="caption"))
    third.write_bytes(whole)
    data = second.read_bytes()
    image = formats.encoded(formats.picture(7), "PNG")  # of the second group, rows 7 and 8
    second.write_bytes(data.replace(image, image[:50] + b"????" + image[54:]))
    source, bad = Parquet(folder, caption="caption"), []
    for number in range(15):
        try:
            assert source[number]["caption"] == f"picture {number} ü"
        except BadRow as flaw:
            bad.append((number, flaw.reason))
    assert bad == [(7, "the group of rows is damaged"), (8, "the group of rows is damaged")]
    pq.write_table(shard(10, rows=1, image=[{"bytes": b"", "path": "../1.png"}]), third)
    with pytest.raises(BadRow, match="the name of the image is not allowed"):
        _ = Parquet(folder, caption="caption")[10]
    for options, told in (({}, "label or caption"), ({"caption": "a", "text": "b"}, "text alone")):
        with pytest.raises(ValueError, match=told):
            Parquet(folder, **options)
    with pytest.raises(ValueError, match=r"source\.label='caption' is string: name a column of whole numbers"):
        len(Parquet(folder, label="caption"))
    with pytest.raises(FileNotFoundError, match=r"of the split 'dev': it has 'data/test-"):
        len(Parquet(folder, text="text", split="dev"))


@pytest.mark.parametrize("begin", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow_that_is_cut_is_refused_and_places_outside_are_bad_rows(tmp_path, begin):
    path, whole = tmp_path / "a.arrow", pa.table({"text": [f"text {n}" for n in range(4)]})
    with begin(str(path), whole.schema) as writer:
        writer.write_table(whole, max_chunksize=2)
    data = path.read_bytes()
    places = np.array([0, 6, 12], np.int32).tobytes()
    path.write_bytes(data.replace(places, np.array([0, 6, 1 << 30], np.int32).tobytes(), 1))
    source = Parquet(tmp_path, text="text")
    assert [source[n]["text"] for n in (2, 3)] == ["text 2", "text 3"]
    for row in (0, 1):
        with pytest.raises(BadRow, match=rf"a\.arrow row {row + 1}: the group of rows is damaged"):
            _ = source[row]
    for cut in (8, 30, len(data) // 2, len(data)):
        path.write_bytes(data[: len(data) - cut])
        with pytest.raises(ValueError, match=r"a\.arrow' is no whole Parquet or Arrow file \(.*\): copy it again"):
            len(Parquet(tmp_path, text="text"))


def test_a_mixture_with_parquet_resumes_bit_for_bit(folder):
    fields, rows = table(Bytes()), {"see": 4, "write": 2}

    def mixture(prefetch):
        tasks = {
            "see": SourceTask("see", Parquet(folder, caption="caption"), ImageToCaption(32), fields),
            "write": SourceTask("write", Parquet(folder, text="text"), Text(16), fields),
        }
        return Mixture(tasks, rows, seed=0, prefetch=prefetch)

    whole = mixture(2)
    for _ in range(3):
        next(whole)
    state = whole.get_state()
    wanted = [next(whole) for _ in range(3)]
    whole.close()
    resumed = mixture(0)
    resumed.set_state(state)
    jax.tree.map(np.testing.assert_array_equal, wanted, [next(resumed) for _ in range(3)])
    assert all(part.tokens[name].valid.any() for name, part in wanted[0].items() for name in part.tokens)
