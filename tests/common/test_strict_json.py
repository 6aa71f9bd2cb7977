"""JSON from strangers: what Python reads and JSON forbids is refused, and so is what is too deep or too long."""

import math

import pytest

from src.common.files.strict_json import parse_json, read_json


def test_sound_json_is_read(tmp_path):
    deep = b"[" * 63 + b"1" + b"]" * 63
    for data, value in ((b'{"a": [1, 2.5, "\\u00e9", null, true]}', {"a": [1, 2.5, "é", None, True]}), (b" 7 ", 7)):
        assert parse_json(data, "it") == value
    assert parse_json(deep, "it") and parse_json(b'["\\ud83d\\ude00"]', "it") == ["😀"]
    assert math.isnan(parse_json(b"[NaN]", "it", finite=False)[0])
    assert parse_json(b"[1e999]", "it", finite=False) == [math.inf]
    for mark in (b"", b"\xef\xbb\xbf"):  # as programs of Windows begin a file
        (tmp_path / "a.json").write_bytes(mark + b"[1]\r\n")
        assert read_json(tmp_path / "a.json") == [1]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not sound JSON"),
        (b"{", "not sound JSON"),
        (b"[1] 2", "Extra data"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
        (b"[NaN]", "NaN is not JSON"),
        (b"[-Infinity]", "-Infinity is not JSON"),
        (b"[1e999]", "'1e999' is too large"),
        (b"[" + b"9" * 5000 + b"]", "not sound JSON"),
        (b"[" * 65 + b"]" * 65, "more than 64 levels"),
        (b"[" * 100_000, "more than 64 levels|not sound JSON"),
        (b'{"a":' * 100_000, "more than 64 levels|not sound JSON"),
        (b'["\xff"]', "not UTF-8 text .byte 2"),
        (b'["\\ud800"]', "not sound JSON"),
        (b'{"\\ud800": 1}', "not sound JSON"),
        (b'["\\ud800"]', "half a surrogate pair"),
        ('["a"]'.encode("utf-16"), "UTF-16 text, not UTF-8"),
        ('["a"]'.encode("utf-16-be"), "UTF-16 text, not UTF-8"),
        (b'\xef\xbb\xbf\xef\xbb\xbf["a"]', "not sound JSON"),
    ],
)
def test_the_rest_is_refused_in_one_sentence(data, reason):
    with pytest.raises(ValueError, match=f"^the file x is .*({reason})") as error:
        parse_json(data, "the file x")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400 and not isinstance(error.value, UnicodeError)


def test_long_files_are_not_read_to_their_end(tmp_path):
    (tmp_path / "long.json").write_bytes(b"[" + b" " * 2000 + b"]")
    with pytest.raises(ValueError, match=r"the index .*long.json' has more than 1,000 bytes"):
        read_json(tmp_path / "long.json", limit=1000, what="index")
