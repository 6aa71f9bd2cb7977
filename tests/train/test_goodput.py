"""Where the time of a run went: sums by hand, restarts, and files that are not as they were written."""

import contextlib
import json
import time

import jax
import numpy as np
import pytest
from PIL import Image

from src.tools import goodput as tool
from src.train import goodput
from src.train.goodput import PARTS, Goodput, read_attempts, summary
from tests.helpers.one_run import Lines, small_loop


def line(step, attempt, begun, at, **seconds):
    return json.dumps({"step": step, "time": at, "attempt": attempt, "from": begun} | dict.fromkeys(PARTS, 0) | seconds)


# Three processes: the first is killed after step 30, saved 20; the second after step 25, before it saved; the third is
# at work. All of the second's steps, and those of the first behind 20, were done again.
HISTORY = [
    line(0, 0, 0, 1004.0, start=4.0),
    line(20, 0, 0, 1030.0, start=4.0, compile=6.0, data=2.0, steps=18.0),
    line(30, 0, 0, 1040.0, start=4.0, compile=6.0, data=3.0, steps=25.0, save=2.0),
    line(20, 1, 20, 1065.0, start=5.0),
    line(25, 1, 20, 1075.0, start=5.0, compile=1.0, data=1.0, steps=8.0),
    line(20, 2, 20, 1105.0, start=5.0),
    line(40, 2, 20, 1130.0, start=5.0, compile=1.0, data=2.0, steps=20.0, save=1.0, evaluate=1.0),
]
SUMS = {"start": 14.0, "compile": 8.0, "data": 4.0, "steps": 38.0, "save": 1.0, "evaluate": 1.0, "other": 0.0}
SUMS |= {"lost": 1.0 + 7.0 + 2.0 + 9.0, "lost_steps": 15.0, "restarts": 2.0}
DAMAGED = ["", "{", '{"step": 1}', "[1, 2]", "null", "\0" * 200, '"\ud800"', "[" * 9000, line(10**400, 3, 0, 0.0),
           line(5, 10**9, 0, 0.0), line(5, -1, 0, 0.0), line(7, 0, 0, 1.0, steps=float("nan")),
           line(7, 0, 0, 1.0, steps=-5.0), line(7, 0, 0, 1.0, data="x")]  # fmt: skip


def check(path):
    told = summary(read_attempts(path))
    seconds = {name.removeprefix("goodput/"): value for name, value in told.items() if name != "goodput"}
    assert seconds == pytest.approx(SUMS) and told["goodput"] == pytest.approx(38.0 / 85.0)
    assert set(told) == set(goodput.NAMES)


def test_sums_of_a_run_with_two_restarts_by_hand(tmp_path, capsys):
    path = tmp_path / "goodput.jsonl"
    path.write_text("\n".join(HISTORY) + "\n")
    check(path)
    assert tool.main(["goodput", f"--workdir={tmp_path}"]) == 0
    said = capsys.readouterr().out
    rows = {words[0]: words[1:] for words in map(str.split, said.splitlines()) if words}
    assert rows["steps"] == ["38.0", "44.7%"] and rows["lost"] == ["19.0", "22.4%"] and rows["in"] == [
        "all", "85.0", "100.0%",
    ]  # fmt: skip
    assert "restarts 2, steps done again 15" in said
    assert "not counted: 45.0 s" in said, "1060 - 1040 and 1100 - 1075"
    assert rows["1"] == ["20", "25", "15.0", *4 * ["0.0"], "1.0", "5.0", "0.0", "9.0"]
    pixels = np.asarray(Image.open(tmp_path / "goodput.png"))
    first = pixels[tool.GAP + tool.HEIGHT + tool.GAP + 1, tool.LABEL : tool.LABEL + tool.BAR]
    colors, counts = np.unique(first, axis=0, return_counts=True)
    widths = {f"#{bytes(color).hex()}": int(count) for color, count in zip(colors, counts, strict=True)}
    for part, color in zip(tool.ORDER, tool.COLORS, strict=True):
        assert widths.get(color, 0) == pytest.approx(SUMS[part] / 85.0 * tool.BAR, abs=1.1), part


def test_damaged_lines_are_passed_over(tmp_path):
    path = tmp_path / "goodput.jsonl"
    mixed = [text for pair in zip(HISTORY, DAMAGED[: len(HISTORY)], strict=True) for text in pair]
    text = "\n".join([*mixed, *DAMAGED[len(HISTORY) :], HISTORY[-1][:-9]])
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    check(path)


def test_what_the_tool_cannot_use_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "empty").mkdir()
    (tmp_path / "pipe").mkdir()
    (tmp_path / "pipe" / "goodput.jsonl").symlink_to("/dev/zero")
    (tmp_path / "sound").mkdir()
    (tmp_path / "sound" / "goodput.jsonl").write_text("\n".join(HISTORY))
    for words, said in (
        ([], "no workdir is given"),
        (["--workdir=what://x"], "addresses what:// cannot be read"),
        ([f"--workdir={tmp_path}/empty"], "there is no account of a run in"),
        ([f"--workdir={tmp_path}/pipe"], "is not a plain file"),
        ([f"--workdir={tmp_path}/sound", f"--out={tmp_path}/file/x.png"], "cannot be written"),
        (["--workdirs=x"], "workdirs"),
        (["x"], "what is 'x'?"),
    ):
        assert tool.main(["goodput", *words]) == 1
        error = capsys.readouterr().err.strip()
        assert said in error and error.startswith("error: ") and "\n" not in error, error


def test_the_parts_add_up_to_the_time_and_what_was_done_again_is_lost(tmp_path, monkeypatch):
    path, began = tmp_path / "goodput.jsonl", []

    def killed(step):
        if step == 4:
            raise KeyboardInterrupt

    def update(state, batch):
        time.sleep(0.03)
        return state, small_loop.measured

    accounts = []
    for each in (killed, lambda step: None):
        began.append(time.time())
        accounts.append(Goodput(path, time.monotonic()))
        with contextlib.suppress(KeyboardInterrupt):
            small_loop(monkeypatch, Lines(each), update=update, goodput=accounts[-1])
        accounts[-1].close()
    first, second = read_attempts(path)
    walls = [each.last.time - then for each, then in zip((first, second), began, strict=True)]
    assert [first.last.total, second.last.total] == pytest.approx(walls, abs=0.05)
    assert (first.lost_steps, second.lost_steps) == (4, 0) and second.seconds["steps"] >= 6 * 0.03
    assert first.lost == pytest.approx(sum(first.last.seconds[part] for part in goodput.AGAIN), abs=1e-6)
    assert first.lost >= 4 * 0.03
    told = accounts[1].scalars()
    walls[1] = time.time() - began[1]
    assert told["goodput/lost_steps"] == 4 and told["goodput/restarts"] == 1
    assert sum(told[f"goodput/{part}"] for part in (*PARTS, "lost")) == pytest.approx(sum(walls), abs=0.05)


def test_programs_that_a_step_compiles_are_no_step(tmp_path):
    account = Goodput(tmp_path / "goodput.jsonl", time.monotonic())
    account.begin(0)
    account.at("steps")
    began = account._since
    jax.jit(lambda x: jax.lax.sort(x) * account._begun + began)(np.ones(7)).block_until_ready()
    account.record(1)
    account.close()
    wall = account._since - began
    assert 0.005 < account.seconds["compile"] < wall
    assert account.seconds["compile"] + account.seconds["steps"] == pytest.approx(wall, abs=1e-3)


def test_a_history_that_cannot_be_read_is_a_warning(tmp_path, caplog):
    (tmp_path / "goodput.jsonl").symlink_to("/dev/zero")
    account = Goodput(tmp_path / "goodput.jsonl", time.monotonic())
    account.begin(7)
    account.record(8)
    account.close()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(told) == 2 and "not known" in told[0] and "training goes on" in told[1]
    assert account.scalars()["goodput/restarts"] == 0
