"""Chats in the forms of four data sets give the same rows; what is no chat is a bad row that names a form."""

import json

import pytest

from src.codecs.text import Bytes
from src.data import told_once
from src.data.example import BadRow
from src.data.sources.documents import Documents
from src.data.sources.llava import Llava
from src.data.sources.ultrachat import UltraChat
from src.data.task import SourceTask
from src.data.templates.chat import Chat
from src.data.templates.packed import Packed
from tests.helpers.fields import table
from tests.helpers.rows import build, words

CODEC = Bytes()
SAID = ["Why?", "So.", "And now?", "No."]


def roles(turns, who="role", what="content", names=("user", "assistant")):
    return [{who: names[i % 2], what: text} for i, text in enumerate(turns)]


def spoken(*turns):
    """Turns of OpenAI's form, of "role: text"."""
    return [dict(zip(("role", "content"), turn.split(": "), strict=True)) for turn in turns]


def weighed(text, weight, key="weight"):
    return [{"role": "assistant", "content": text, key: weight}]


SYSTEM = "what the system says is no text"
MORE = "a key holds what is no text of a turn"
UNTRAINED = "an answer is marked as one that is not to be trained"

FORMS = {
    "ultrachat": {"id": "1", "data": SAID},
    "openai": {"messages": roles(SAID)},
    "openai, in parts": {
        "prompt": "Why?",
        "messages": [m | {"content": [{"type": "text", "text": m["content"]}]} for m in roles(SAID)],
    },
    "sharegpt": {"id": "1", "conversations": roles(SAID, "from", "value", ("human", "gpt"))},
    "sharegpt, other names": {"conversation": roles(SAID, "from", "value", ("User ", "ChatGPT"))},
    "alpaca": {"instruction": SAID[2], "input": "", "output": SAID[3], "history": [SAID[:2]]},
}


def read(source, row):
    """The turns of a row, or the reason why there are none."""
    try:
        return source[row]["turns"]
    except BadRow as flaw:
        return flaw.reason


def written(folder, rows):
    folder.mkdir(exist_ok=True)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return UltraChat(folder)


@pytest.mark.parametrize("split", [0, 1000])
def test_four_forms_are_one_chat(tmp_path, split, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = written(tmp_path / "c", FORMS.values())
    source.split = split
    assert [read(source, row) for row in range(len(FORMS))] == [SAID] * len(FORMS)
    fields = table(CODEC)
    for template, name in ((Chat(64), "text"), (Packed(32), "text")):
        task = SourceTask("t", source, template, fields)
        rows = range(task.rows("train"))
        said = {words(CODEC, build(task, "train", [row]).tokens[name]) for row in rows}
        assert said == {"<s>Why?[So.</s>]<s>And now?[No.</s>]"}
    for form in FORMS.values():  # those without an image, in the list of LLaVA
        (tmp_path / "l.json").write_text(json.dumps([form]))
        assert read(Llava(tmp_path / "l.json", tmp_path), 0) == SAID


def test_a_list_is_read_where_there_are_no_lines(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rows = [*FORMS.values()]
    (tmp_path / "c").mkdir()
    for data in (json.dumps(rows, indent=1), "\n".join(map(json.dumps, rows))):
        (tmp_path / "c/alpaca_data.json").write_bytes(b"\xef\xbb\xbf" + data.encode())
        source = UltraChat(tmp_path / "c")
        assert [read(source, row) for row in range(len(source))] == [SAID] * len(rows)
    assert source[1].where == "alpaca_data.json line 2"
    written(tmp_path / "c", rows[:1])
    assert len(UltraChat(tmp_path / "c")) == 1 and len(UltraChat(tmp_path / "c", names="*.json*")) == len(rows) + 1
    (tmp_path / "none").mkdir()
    with pytest.raises(FileNotFoundError, match=r"none' has no \*\.jsonl or \*\.json: .*\"messages\""):
        len(UltraChat(tmp_path / "none"))


@pytest.mark.parametrize(
    ("row", "turns"),
    [
        ({"messages": spoken("system: Be short.", "user: a", "assistant: b")}, ["Be short.\n\na", "b"]),
        ({"system": "Be short.", "messages": spoken("user: a", "assistant: b")}, ["Be short.\n\na", "b"]),
        ({"messages": spoken("system:  ", "user: a", "assistant: b")}, ["a", "b"]),
        ({"messages": spoken("user: a", "system: Be short.", "assistant: b")}, ["a\n\nBe short.", "b"]),
        (
            {"messages": spoken("user: a", "assistant: b", "developer: Rhyme.", "user: c", "assistant: d")},
            ["a", "b", "Rhyme.\n\nc", "d"],
        ),
        ({"messages": spoken("assistant: hello", "user: a", "assistant: b", "user: c")}, ["a", "b"]),
        ({"messages": spoken("system: S.", "assistant: hello", "user: a", "assistant: b")}, ["S.\n\na", "b"]),
        ({"instruction": "Add.", "input": "1, 2", "output": "3"}, ["Add.\n\n1, 2", "3"]),
        ({"instruction": "Add.", "output": "3", "system": "Be short."}, ["Be short.\n\nAdd.", "3"]),
        ({"instruction": "Add.", "input": None, "output": "3", "history": None}, ["Add.", "3"]),
        ({"data": "of ultrachat", "messages": spoken("user: a", "assistant: b")}, ["a", "b"]),
        ({"data": spoken("user: a", "assistant: b")}, ["a", "b"]),
        ({"data": ["a\0b", "c\0"]}, ["a\0b", "c\0"]),
        ({"system": "S.", "data": ["a", "b", "c", "d"]}, ["S.\n\na", "b", "c", "d"]),
        ({"system_prompt": "S.", "data": ["a", "b", "c"]}, ["S.\n\na", "b"]),
        ({"system": None, "data": ["a", "b"]}, ["a", "b"]),
        ({"system": " ", "conversation": spoken("user: a", "assistant: b")}, ["a", "b"]),
        ({"system_prompt": "S.", "conversations": spoken("user: a", "assistant: b")}, ["S.\n\na", "b"]),
        ({"system": "S.", "messages": spoken("system: T.", "user: a", "assistant: b")}, ["S.\n\nT.\n\na", "b"]),
        ({"system": [{"type": "text", "text": "S."}], "data": ["a", "b"]}, ["S.\n\na", "b"]),
        (
            {"instruction": "c", "output": "d", "system": "S.", "history": [["a", "b"]]},
            ["S.\n\na", "b", "c", "d"],
        ),
        ({"instruction": "a", "output": "b", "system_prompt": "S."}, ["S.\n\na", "b"]),
        ({"messages": spoken("user: a", "assistant: b", "system: at the end")}, ["a", "b"]),
        (
            {
                "messages": [
                    {"role": "user", "content": "a", "weight": 0},
                    *weighed("b", 1),
                    *spoken("user: c"),
                    *weighed("d", None),
                ]
            },
            ["a", "b", "c", "d"],
        ),
        (
            {"messages": spoken("user: a", "assistant: b"), "images": [], "context": "", "tools": None, "score": 3},
            ["a", "b"],
        ),
    ],
)
def test_systems_and_greetings(tmp_path, row, turns):
    assert read(written(tmp_path, [row]), 0) == turns


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b"}, "there is no conversation"),
        ({"text": "a"}, "there is no conversation"),
        ({}, "there is no conversation"),
        ({"messages": "a"}, "the turns are no list of texts"),
        ({"messages": []}, "the turns are no list of texts"),
        ({"messages": [*spoken("user: a"), "b"]}, "the turns are no list of texts"),
        ({"messages": spoken("user: a", "user: b", "assistant: c")}, "the turns are not question and answer"),
        ({"messages": spoken("user: a", "assistant: b", "assistant: c")}, "the turns are not question and answer"),
        ({"messages": spoken("assistant: a")}, "the turns are not question and answer"),
        ({"messages": spoken("user: a", "tool: b", "assistant: c")}, "the role of a turn is unknown"),
        ({"messages": [{"content": "a"}, {"content": "b"}]}, "the role of a turn is unknown"),
        ({"messages": [{"role": ["user"], "content": "a"}]}, "the role of a turn is unknown"),
        ({"messages": [*spoken("user: a"), {"role": "assistant", "content": None}]}, "the turns are no list of texts"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, *spoken("assistant: b")]},
         "the turns are no list of texts"),
        ({"messages": spoken("user: a", "assistant:  ")}, "a turn is empty"),
        ({"instruction": "Add.", "input": "1"}, "the turns are no list of texts"),
        ({"instruction": 7, "output": "3"}, "the turns are no list of texts"),
        ({"instruction": "Add.", "input": [1], "output": "3"}, "the turns are no list of texts"),
        ({"instruction": "Add.", "output": ""}, "a turn is empty"),
        ({"instruction": "", "output": "3"}, "a turn is empty"),
        ({"instruction": "Add.", "output": "3", "history": ["a"]}, "the history is no list of questions"),
        ({"system": ["S."], "data": ["a", "b"]}, SYSTEM),
        ({"system": 0, "conversations": spoken("user: a", "assistant: b")}, SYSTEM),
        ({"system_prompt": {}, "messages": spoken("user: a", "assistant: b")}, SYSTEM),
        ({"system": [], "instruction": "Add.", "output": "3"}, SYSTEM),
        ({"messages": [{"role": "system", "content": None}, *spoken("user: a", "assistant: b")]}, SYSTEM),
        ({"messages": [*spoken("user: a", "assistant: b"), {"role": "system", "content": 7}]}, SYSTEM),
        ({"messages": spoken("system: S.", "user: ", "assistant: b")}, "a turn is empty"),
        ({"messages": spoken("user:  ", "system: S.", "assistant: b")}, "a turn is empty"),
        ({"system": "S.", "data": ["", "b"]}, "a turn is empty"),
        ({"system": "S.", "data": [None, "b"]}, "the turns are no list of texts"),
        ({"system": "S.", "conversations": spoken("user:  ", "assistant: b")}, "a turn is empty"),
        ({"system": "S.", "instruction": "", "input": " ", "output": "b"}, "a turn is empty"),
        ({"messages": [*spoken("user: a"), *weighed("b", 0)]}, UNTRAINED),
        ({"messages": [*spoken("user: a", "assistant: b", "user: c"), *weighed("d", 0.0)]}, UNTRAINED),
        ({"conversations": [*spoken("user: a"), *weighed("b", False, "train")]}, UNTRAINED),
        ({"conversations": [*spoken("user: a"), *weighed("b", 0.5)]}, UNTRAINED),
        ({"messages": [*spoken("user: a"), *weighed("b", False, "loss")]}, UNTRAINED),
        ({"messages": spoken("user: a", "assistant: b"), "images": ["a.png"]}, MORE),
        ({"data": ["a", "b"], "image": "a.png"}, MORE),
        ({"instruction": "Add.", "context": "1, 2", "output": "3"}, MORE),
        ({"instruction": "Add.", "context": "1, 2", "response": "3"}, MORE),
        ({"messages": [*spoken("user: a"), *weighed("b", "Hm.", "reasoning_content")]}, MORE),
        ({"messages": [*spoken("user: a"), *weighed("b", [{"id": 1}], "tool_calls")]}, MORE),
    ],
)  # fmt: skip
def test_what_is_no_chat_is_a_bad_row(tmp_path, row, reason):
    assert read(written(tmp_path, [row]), 0).startswith(reason)


def test_bad_rows_of_chats_name_the_key_and_the_turn(tmp_path):
    source = written(tmp_path, [
        {"messages": [*spoken("user: a"), *weighed("b", 0)]}, {"data": ["a", "b"], "context": "c"},
        {"messages": [*spoken("user: a"), *weighed("b", "Hm.", "thinking")]}, {"system_prompt": 7, "data": ["a", "b"]},
    ])  # fmt: skip
    for row, match in enumerate(
        (r"\(turn 2 has weight=0; ", r"\('context': ", r"\(turn 2: 'thinking': ", r"\(system_prompt\)")
    ):
        with pytest.raises(BadRow, match=rf"line {row + 1}: .*{match}"):
            source[row]
    (tmp_path / "l.json").write_text(json.dumps([{"data": ["a", "b"], "image": "x.png", "images": ["y.png"]}]))
    assert read(Llava(tmp_path / "l.json", tmp_path), 0) == MORE


def test_a_bad_row_names_the_form_wanted(tmp_path):
    source = written(tmp_path, [{"prompt": "a", "chosen": "b"}])
    with pytest.raises(BadRow, match=r"a\.jsonl line 1: .*'prompt', 'chosen'.*\"messages\": \[") as error:
        source[0]
    assert BadRow.unpack(error.value.pack()).detail == error.value.detail  # not cut on its way to the report


def test_what_is_left_out_of_chats_is_told_once(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(told_once, "_told", set())
    ask, say = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    rows = [
        {"messages": [ask, say], "id": "x7", "prompt_id": 3, "tags": [], "prompt": "a", "system": "two words"},
        {"messages": [say, ask, say, ask]},
        {"messages": [ask, say, {"role": "system", "content": "be kind"}]},
        {"data": ["a", "b", "c"]},
        {"messages": [ask, say], "data": ["c", "d"], "chosen": [say]},
        {"messages": [ask, say | {"markdown": "b, but longer", "name": "B"}]},
        {"messages": [], "conversations": [ask, say]},
        {"instruction": "a", "output": "b", "completion": "b or c"},
    ]
    source = written(tmp_path, [*rows, *rows])
    assert [source[n]["turns"][-2:] for n in range(len(source))] == [["two words\n\na", "b"], *[["a", "b"]] * 7] * 2
    line = "a.jsonl line"
    assert [r.getMessage().removesuffix(" (told once)") for r in caplog.records] == [
        f"{line} 2: the answer before the first question is left out",
        f"{line} 2: the last question has no answer and is left out",
        f"{line} 3: what the system says behind the last answer is left out",
        f"{line} 5: the key 'data' beside the turns is not read",
        f"{line} 5: the key 'chosen' beside the turns is not read",
        f"{line} 6: the key 'markdown' of a turn is not read",
        f"{line} 8: the key 'completion' beside the turns is not read",
    ]
    with pytest.raises(BadRow, match=r"no list of texts \('output' is none; its keys are 'instruction', 'response'\)"):
        _ = written(tmp_path, [{"instruction": "a", "response": "b"}])[0]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": "天空为什么是蓝色的"}, "the key 'prompt' beside the turns is not read"),
        ({"hint": "one\ntwo"}, "the key 'hint' beside the turns is not read"),
        ({"style": "Rhyme!"}, "the key 'style' beside the turns is not read"),
        ({"weight": 0}, "the key 'weight' beside the turns is not read"),
        ({"turn": {"trainable": False}}, "the key 'trainable' of a turn is not read"),
        ({"turn": {"loss_mask": 0}}, "the key 'loss_mask' of a turn is not read"),
        ({"sample_weight": 0.5}, "the key 'sample_weight' beside the turns is not read"),
        ({"image_2": "a/b.PNG"}, "the key 'image_2' beside the turns is not read"),
        ({"split": "test_sft"}, "a row with split='test_sft' is one like the others: put such rows elsewhere"),
        ({"ask": {"train": True}}, "a question is marked as one to be trained, and the answers are the targets"),
        ({"parts": {"note": "two words"}}, "the key 'note' of a part is not read"),
        ({"id": "x-7_a.json", "lang": "en", "weight": 1, "score": 3, "ok": False, "turn": {"id": "b7"}}, ""),
        ({"url": "http://x/a.png", "set": "contest", "strain": 2, "ask": {"weight": 0}, "turn": {"loss": 1}}, ""),
    ],
)
def test_a_key_that_may_say_more_is_told(tmp_path, caplog, monkeypatch, row, told):
    """Words without a space between, and marks of what is to be trained under other names."""
    monkeypatch.setattr(told_once, "_told", set())
    ask, turn, part = spoken("user: a")[0], row.pop("turn", {}), row.pop("parts", None)
    ask |= row.pop("ask", {})
    ask |= {"content": [{"type": "text", "text": "a"} | part]} if part else {}
    assert read(written(tmp_path, [row | {"messages": [ask, spoken("assistant: b")[0] | turn]}]), 0) == ["a", "b"]
    assert [r.getMessage() for r in caplog.records] == [f"a.jsonl line 1: {told} (told once)"] * bool(told)


def test_many_keys_do_not_hide_what_is_cut(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(told_once, "_told", set())
    chat = {"messages": spoken("user: a", "assistant: b")}
    source = written(tmp_path, [{f"k{n}": "two words" for n in range(99)} | chat, {"data": ["a", "b", "</s>"]}])
    assert [source[n]["turns"] for n in range(2)] == [["a", "b"]] * 2
    build(SourceTask("t", written(tmp_path, [{"data": ["a", "b </s>"]}]), Chat(4), table(CODEC)), "train", [0])
    assert [r.getMessage().removesuffix(" (told once)") for r in caplog.records][told_once.KEYS :] == [
        "a.jsonl line 1: further keys beside the turns are not read, either",
        "a.jsonl line 2: the last question has no answer and is left out",
        "a.jsonl line 1: </s> stands in a text and is read as text, not as a special token",
        "a.jsonl line 1: the chat is cut to 4 tokens: give a larger length, or too_long='skip' to refuse such rows",
    ]


def test_bad_rows_of_chats_say_what_is_no_text(tmp_path):
    rows = [
        {"instruction": "Add one.", "input": 0, "output": "1"}, {"instruction": "a", "output": 6},
        {"data": ["a", None]}, {"data": [{"data": ["a", "b"]}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image": "x.png"}]}]},
    ]  # fmt: skip
    said = ["'input' is 0, no text", "'output' is 6, no text", "turn 2 is None", "turn 1 has the keys 'data'; known"]
    source = written(tmp_path, rows)
    for row, match in enumerate([*said, "turn 1: 'image': put it"]):
        with pytest.raises(BadRow, match=match):
            source[row]


def test_a_chat_about_an_image_in_a_row_of_text_is_told(tmp_path, caplog, monkeypatch):
    (tmp_path / "l.json").write_text(json.dumps([{"image": "1.png", "conversations": roles(["<image>\nWhy?", "So."])}]))
    for template in (Chat(32), Packed(32)):
        monkeypatch.setattr(told_once, "_told", set())
        caplog.clear()
        build(SourceTask("t", Llava(tmp_path / "l.json", tmp_path), template, table(CODEC)), "train", [0])
        assert "l.json element 1: the image of a chat is not read here, and its marker is text" in caplog.text


def test_a_marker_without_an_image_and_keys_beside_parts_are_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(told_once, "_told", set())
    (tmp_path / "l.json").write_text(json.dumps([{"conversations": roles(["<image>\nWhy?", "So."])}] * 2))
    source = Llava(tmp_path / "l.json", tmp_path)
    assert [source[n]["turns"][0] for n in range(2)] == ["<image>\nWhy?"] * 2
    monkeypatch.setattr(told_once, "_told", set())
    assert read(written(tmp_path / "c", [{"data": ["<image>\nWhy?", "So."]}]), 0)[0] == "<image>\nWhy?"
    parts = {"parts": [{"text": "a"}], "id": "x7", "title": "a title", "url": ""}
    (tmp_path / "documents.jsonl").write_text(json.dumps(parts) + "\n" + json.dumps(parts) + "\n")
    source = Documents(tmp_path)
    assert [source[n]["parts"] for n in range(2)] == [[{"text": "a"}]] * 2
    told = [r.getMessage() for r in caplog.records if "left out" not in r.getMessage()]
    assert told == [
        "l.json element 1: <image> stands in a chat without an image and is read as text (told once)",
        "a.jsonl line 1: <image> stands in a chat without an image and is read as text (told once)",
        "documents.jsonl line 1: the key 'title' beside the parts is not read (told once)",
    ]
