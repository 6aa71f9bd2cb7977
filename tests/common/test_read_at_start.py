"""Files of a workdir that are read at a start: a link to a device, a pipe and a huge file are not read without end."""

import json
import os
import resource

import pytest
from etils import epath

from src.common.files.paths import bounded_lines, check_plain, read_bounded
from src.common.files.store import write_whole
from src.common.runtime.writers import JsonLinesWriter
from src.data.example import BadRow
from src.data.pipeline.bad_rows import Ledger
from src.train.checkpoints.lock import Lock
from src.train.checkpoints.retention import ScoreFile
from src.train.goodput import Goodput

WAYS = {
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a pipe": os.mkfifo,
    "a huge file": lambda path: (path.touch(), os.truncate(path, 24 << 30)),
    "a link to a huge file": lambda path: (
        path.with_name("huge").touch(), os.truncate(path.with_name("huge"), 24 << 30), path.symlink_to("huge")
    ),
    "a folder": lambda path: path.mkdir(),
    "nested": lambda path: path.write_bytes(b'{"step": ' + b"[" * 20000 + b"]" * 20000 + b"}\n"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def little_memory():
    """2 GB more than now: who reads without bound fails here, and not the machine."""
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (now + (2 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS)
def test_the_log(tmp_path, caplog, way):
    WAYS[way](tmp_path / "log.jsonl")
    log = JsonLinesWriter(tmp_path / "log.jsonl")
    log.rewind(3)
    log.write_scalars(4, {"loss": 0.5})
    log.close()
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if way == "nested":  # a line that is no line of a log goes, as half a line does
        assert not told and json.loads((tmp_path / "log.jsonl").read_text())["step"] == 4
    else:
        assert len(told) == 1 and str(tmp_path / "log.jsonl") in told[0] and "training goes on" in told[0]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS)
def test_the_list_of_bad_rows(tmp_path, caplog, way):
    WAYS[way](tmp_path / "skipped.jsonl")
    ledger = Ledger(tmp_path)
    ledger.add("task", 100, [(7, BadRow("train.jsonl line 8", "no text"))])
    ledger.save()
    assert ledger.skipped["task"] == 1
    if way not in ("nested", "a huge file", "a link to a huge file"):
        assert "skipped.jsonl" in caplog.text and "Traceback" not in caplog.text


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS)
def test_the_account_of_the_time(tmp_path, caplog, way):
    WAYS[way](tmp_path / "goodput.jsonl")
    account = Goodput(tmp_path / "goodput.jsonl")
    account.begin(3)
    account.record(4)
    account.close()
    assert account.scalars()["goodput/restarts"] == 0
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert bool(told) == (way != "nested") and all("goodput.jsonl" in text for text in told)


@pytest.mark.timeout(20)
@pytest.mark.parametrize("way", WAYS)
def test_the_lock_and_the_scores(tmp_path, caplog, way):
    WAYS[way](tmp_path / "lock.json")
    lock = Lock(epath.Path(tmp_path / "lock.json"))
    if way in ("a device", "a pipe", "a folder"):
        with pytest.raises(OSError, match=r"lock\.json is not a plain file: remove it"):
            lock.take()
    else:
        assert lock._read() == {}, "a run that left no name"
    lock.release()
    book, path = ScoreFile(epath.Path(tmp_path)), tmp_path / "scores.json"
    (tmp_path / "huge").unlink(missing_ok=True)
    WAYS[way](path)
    assert book.read() == {} and "no checkpoint counts as best" in caplog.text


@pytest.mark.timeout(20)
def test_a_lock_of_strange_values_is_not_alive(tmp_path):
    for pid in (10**30, -(10**30), "x\0y", "../../etc", [1], {}, None, 1.5):
        lock = Lock(epath.Path(tmp_path / "lock.json"))
        (tmp_path / "lock.json").write_text(json.dumps(lock._me | {"token": "", "pid": pid, "started": "1"}))
        lock.take()
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
        lock.release()


def test_a_read_takes_the_memory_of_the_file_and_not_of_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    assert read_bounded(tmp_path / "file", 1 << 40) == b"x" * 3_000_000
    (tmp_path / "short").write_bytes(b"")
    assert read_bounded(tmp_path / "short", 0) == b""
    check_plain(tmp_path / "file"), check_plain(tmp_path / "none"), check_plain("gs://bucket/file")


def test_lines_one_at_a_time(tmp_path):
    write_whole(tmp_path / "log", (line for line in (b"a\n", b"bc\n", b"d")))
    with open(tmp_path / "log", "a+b") as file:
        assert list(bounded_lines(file)) == list(bounded_lines(file, 3)) == [b"a\n", b"bc\n", b"d"]
        with pytest.raises(ValueError, match="more than 2 bytes"):
            list(bounded_lines(file, 2))
