"""What is written can be read back, a broken disk is one warning, and only process 0 writes."""

import json

import jax
import jax.numpy as jnp
import numpy as np

from src.common.runtime.writers import JsonLinesWriter, Many, TensorBoard
from tests.helpers.events import events_of


def read_events(folder):
    (path,) = folder.iterdir()
    return {(event.step, v.tag): v for event in events_of(path) for v in event.summary.value}


def test_values_reach_both_files(tmp_path):
    path, folder = tmp_path / "a" / "metrics.jsonl", tmp_path / "tensorboard"
    path.parent.mkdir()
    path.write_text('{"step": 1, "lo')  # a run that was killed in a line
    writer = Many([JsonLinesWriter(path), TensorBoard(folder)])
    writer.write_scalars(2, {"loss/text": jnp.float32(0.5), "rate": np.float64(2.0), "bad": float("nan")})
    writer.write_texts(3, {"sample": "three\nlines"})
    writer.write_images(
        3, {"grid": jnp.linspace(-1, 2, 12).reshape(2, 2, 3), "batch": np.zeros((2, 4, 5, 1), np.uint8)}
    )
    writer.flush()
    writer.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert [{k: v for k, v in line.items() if k != "time"} for line in lines] == [
        {"step": 2, "loss/text": 0.5, "rate": 2.0, "bad": "nan"},
        {"step": 3, "sample": "three\nlines"},
    ]
    events = read_events(folder)
    assert events[2, "loss/text"].simple_value == 0.5 and np.isnan(events[2, "bad"].simple_value)
    assert (3, "sample/text_summary") in events
    assert {k: (v.image.height, v.image.width) for k, v in events.items() if v.HasField("image")} == {
        (3, "grid"): (2, 2),
        (3, "batch/0"): (4, 5),
        (3, "batch/1"): (4, 5),
    }


def test_what_a_killed_run_told_of_later_steps_is_taken_back(tmp_path):
    path, folder = tmp_path / "log.jsonl", tmp_path / "tensorboard"
    told = [(0, "doctor"), (1, "loss"), (2, "loss"), (2, "eval/accuracy"), (4, "loss"), (4, "eval/accuracy")]

    def lines():
        return [(line.pop("step"), *line) for line in map(json.loads, path.read_text().splitlines())]

    def rewound(*arguments, torn=""):
        path.unlink(missing_ok=True)
        writer = Many([JsonLinesWriter(path)])
        for step, name in told:
            writer.write_scalars(step, {name: 1.0})
        with open(path, "a") as file:
            file.write(torn)
        writer.rewind(*arguments)
        writer.write_scalars(9, {"next": 1.0})
        writer.close()
        (step, _, name), *rest = reversed(lines())
        assert (step, name) == (9, "next")
        return [(step, name) for step, _, name in reversed(rest)]

    assert rewound(2) == told[:4] and rewound(2, "eval/") == told[:3] and rewound(4) == told
    assert rewound(4, "eval/") == told[:5], "only the last evaluation comes again"
    assert rewound(-1) == [] and rewound(3) == told[:4]
    for torn in ('{"step": 4, "lo', '{"step": 4}', "4", "\0\0\0"):  # killed in a line, or in its last byte
        assert rewound(4, torn=torn) == told

    first, second = TensorBoard(folder), TensorBoard(folder)
    first.write_scalars(3, {"loss": 1.0})
    assert read_events(folder) == {}, "it is kept for a while"
    Many([first]).settle()
    assert list(read_events(folder)) == [(3, "loss")], "before a checkpoint it is not"
    first.close()
    second.rewind(2)
    second.close()
    starts = [e for file in folder.iterdir() for e in events_of(file) if e.HasField("session_log")]
    assert [(e.step, e.session_log.status) for e in starts] == [(3, 1)], "TensorBoard forgets steps from here on"


def test_a_broken_disk_is_one_warning_and_then_it_is_tried_again(tmp_path, caplog):
    (tmp_path / "place").write_text("a file where a folder should be")
    writers = JsonLinesWriter(tmp_path / "place" / "metrics.jsonl"), TensorBoard(tmp_path / "place")
    for step in range(3):
        Many(writers).write_scalars(step, {"loss": 1.0})
    assert [record.args[0] for record in caplog.records if record.levelname == "WARNING"] == [
        "JsonLinesWriter",
        "TensorBoard",
    ]
    (tmp_path / "place").unlink()
    Many(writers).write_scalars(3, {"loss": 1.0})
    Many(writers).close()
    assert json.loads((tmp_path / "place" / "metrics.jsonl").read_text())["step"] == 3
    full = JsonLinesWriter("/dev/full")  # accepts writes and refuses to keep them
    for step in range(3):
        full.write_scalars(step, {"loss": 1.0})
    full.close()
    warnings = [record.args[0] for record in caplog.records if record.levelname == "WARNING"]
    assert warnings == ["JsonLinesWriter", "TensorBoard", "JsonLinesWriter"]


def test_other_processes_write_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    writer = Many([JsonLinesWriter(tmp_path / "metrics.jsonl"), TensorBoard(tmp_path)])
    writer.write_scalars(1, {"loss": 1.0})
    writer.close()
    assert not list(tmp_path.iterdir())
