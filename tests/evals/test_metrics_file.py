"""metrics.json keeps what was not measured again, and says of each number how it was measured."""

import json

from etils import epath

from src.evals.metrics_file import merge_metrics


def test_numbers_are_merged_and_each_says_how_it_was_measured(tmp_path):
    path = epath.Path(tmp_path / "metrics.json")
    first = {"step": 8, "ema": True, "seed": 0, "config": "a.py", "overrides": {}}
    merge_metrics(path, {"accuracy": 0.123456, "other": 1, "seconds": 7.0}, {"accuracy": first, "other": first})
    again = first | {"ema": False, "overrides": {"guidance.scale": 3.0}, "trained_with": {"guidance.scale": 1.5}}
    found = merge_metrics(path, {"accuracy": 0.5, "steps": 8}, {"accuracy": again})
    written = json.loads(path.read_text())
    assert written.pop("how") == {"accuracy": again, "other": first}
    assert written == found == {"accuracy": 0.5, "other": 1, "seconds": 7.0, "steps": 8}
    merge_metrics(path, {"accuracy": float("nan")}, {})
    assert list(json.loads(path.read_text())["how"]) == ["other"], "nothing is said of a number that is another now"


def test_a_file_of_before_and_one_that_is_damaged(tmp_path):
    path = epath.Path(tmp_path / "metrics.json")
    path.write_text('{"accuracy": 0.25, "steps": 8}')
    assert merge_metrics(path, {"other": 1.0}, {"other": {"step": 9}}) == {"accuracy": 0.25, "steps": 8, "other": 1.0}
    for text in ("{", "[]", '{"how": 3}', '{"a": "x"}', '{"a": {}}'):
        path.write_text(text)
        assert merge_metrics(path, {"other": 1.0}, {"other": {"step": 9}}) == {"other": 1.0}
        assert json.loads(path.read_text()) == {"other": 1.0, "how": {"other": {"step": 9}}}
