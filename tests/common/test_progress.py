"""The line on a terminal and the lines of a log."""

import io
import logging
import time

import jax

from src.common.runtime.progress import Progress

METRICS = {"loss": 2.0, "loss/text": 1.25, "grad_norm": 9.0, "tokens_per_second": 12345.0, "images_per_second": 7.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_terminal_keeps_one_line():
    stream = Terminal()
    progress = Progress(total=100, start=40, stream=stream)
    for step in (50, 70):
        progress.update(step, METRICS)
    progress.close()
    assert "\n" not in stream.getvalue().rstrip("\n")
    last = stream.getvalue().rstrip("\n").split("\r")[-1]
    assert "70/100" in last and "12.3k tok/s, 7.0 img/s, loss 2, text 1.25" in last and "grad_norm" not in last


def test_log_has_lines_and_the_time_left(monkeypatch, caplog):
    now = [10.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    caplog.set_level(logging.INFO, logger="absl")
    progress = Progress(total=1000, start=100, stream=io.StringIO())
    progress.update(100, {})
    now[0] += 100.0
    progress.update(200, METRICS)
    now[0] += 900.0
    progress.update(300, {"loss": 1.0})
    progress.close()
    assert [record.getMessage() for record in caplog.records] == [
        "step 100/1000, unknown time left",
        "step 200/1000, 12.3k tok/s, 7.0 img/s, loss 2, text 1.25, 13:20 left",
        "step 300/1000, loss 1, 58:20 left",
    ]


def test_other_processes_are_silent(monkeypatch, caplog):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    caplog.set_level(logging.INFO, logger="absl")
    stream = Terminal()
    progress = Progress(10, stream=stream)
    progress.update(5, METRICS)
    progress.close()
    assert not caplog.records and not stream.getvalue()
