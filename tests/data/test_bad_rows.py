"""A bad row keeps its place and counts nothing, moves no other row, and is reported once; too many stop the run."""

import json
import logging
import time

import jax
import numpy as np
import pytest

from src.data.example import FLAW_BYTES, BadRow
from src.data.pipeline import bad_rows as ledgers
from src.data.pipeline.bad_rows import Ledger, TooManyBadRowsError, grouped, parted, summary
from src.data.pipeline.first_rows import LOOKED, check_rows
from src.data.pipeline.stream import Mixture, Stream, ordered
from src.data.sources.digits import Digits
from src.data.sources.numbers import RELATIONS, Numbers
from src.data.task import SourceTask
from src.data.templates.caption_to_image import CaptionToImage
from src.data.templates.class_label import ClassLabel
from src.data.templates.image_to_caption import ImageToCaption
from src.data.templates.text import Text
from tests.helpers.fields import table
from tests.helpers.rows import told

FIELDS = table()


def draw():
    return SourceTask("draw", Digits(), CaptionToImage(), FIELDS)


def say():
    return SourceTask("say", Digits(), ImageToCaption(), FIELDS)


def count(relations=tuple(RELATIONS)):
    return SourceTask("count", Numbers(relations=relations), Text(), FIELDS)


def label():
    return SourceTask("label", Digits(), ClassLabel(), FIELDS)


class Flawed:
    """A task some of whose rows are bad."""

    def __init__(self, task, bad):
        self._task, self._bad = task, bad

    def __getattr__(self, name):
        if name.startswith("__") or "_task" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._task, name)

    def read(self, split, index, uniforms=None):
        if index in self._bad:
            raise BadRow("broken", f"row {index}", "as planned")
        return self._task.read(split, index, uniforms)


@pytest.mark.parametrize("make", [draw, say, count, label])
def test_other_rows_are_what_they_would_be_and_the_bad_ones_are_nothing(make):
    task = make()
    rows = task.rows("train")
    bad = set(range(0, rows, 7))
    whole, flawed = Stream(task, 24, seed=1), Stream(Flawed(task, bad), 24, seed=1, ledger=Ledger(share=1))
    parts = [Stream(Flawed(task, bad), 24, seed=1, shard=(i, 2), ledger=Ledger(share=1)) for i in range(2)]
    met = 0
    for _ in range(3):
        clean, found, halves = next(whole), next(flawed), [next(part) for part in parts]
        jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(lambda *a: np.concatenate(a), *halves))
        assert told(clean) == told(found)
        name = task.fill[0]
        sound = found.tokens[name].target.any(axis=1)
        met += (~sound).sum()
        jax.tree.map(lambda a, b, ok=sound: np.testing.assert_array_equal(a[ok], b[ok]), found, clean)
        for path, tokens in found.tokens.items():
            assert not tokens.value[~sound].any() and not tokens.target[~sound].any()
            assert (tokens.valid[~sound] == (path == "image")).all()  # images keep their places: masks stay static
    assert met == flawed._ledger.skipped["data"] == sum(part._ledger.skipped["data"] for part in parts) > 0
    for stream in (whole, flawed, *parts):
        stream.close()


def test_a_batch_of_bad_rows_only_has_the_shape_of_any_other():
    for make in (draw, say, count, label):
        task = make()
        stream = Stream(Flawed(task, range(10**6)), 4, seed=0, ledger=Ledger(share=1))
        batch = next(stream)
        stream.close()
        assert told(batch) == told(task.element_spec(4))
        assert not any(tokens.target.any() or tokens.value.any() for tokens in batch.tokens.values())


def test_each_bad_row_is_written_down_once_whatever_the_epochs_and_restarts(tmp_path):
    task = Flawed(count(relations=("successor",)), {1, 4})
    rows = task.rows("train")
    scalars = []
    for start in (0, 5 * rows):
        mixture = Mixture({"n": task}, {"n": rows}, seed=0, ledger=Ledger(tmp_path, share=1))
        mixture.set_state({"n": start})
        for _ in range(5):
            next(mixture)
            scalars.append(mixture.settle())
        mixture.close()
    assert scalars == [{"data/skipped/n": 2.0}] * 10  # each epoch
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    told = {"task": "n", "reason": "broken", "detail": "as planned"}
    assert sorted(lines, key=lambda line: line["row"]) == [told | {"row": r, "where": f"row {r}"} for r in (1, 4)]

    with open(tmp_path / "skipped.jsonl", "a") as file:
        file.write('{"task": "n", "ro')  # killed while it wrote
    ledger = Ledger(tmp_path, share=1)
    ledger.add("n", 2, [(4, BadRow("broken")), (9, BadRow("other"))])
    ledger.save()
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[-1])["row"] == 9


def test_a_report_names_each_file_once(tmp_path):
    bad = [("a.jsonl line 3", "broken", "x"), ("b.jsonl line 1", "broken", "x"), ("a.jsonl line 4", "broken", "x"),
           ("a.jsonl line 7", "missing", "p.png"), ("a.jsonl line 9 turns 1 to 2", "missing", "q.png"),
           ("00001.arrayrecord record 2", "damaged", ""), ("n1/e f.JPEG", "broken", "x"), ("n1/g.JPEG", "broken", "x"),
           ("t.tar s/7.jpg", "broken", "y")]  # fmt: skip
    assert grouped(bad) == (
        "a.jsonl: broken (x): line 3, line 4; missing: line 7 (p.png), line 9 turns 1 to 2 (q.png); "
        "b.jsonl: broken (x): line 1; 00001.arrayrecord: damaged: record 2; broken (x): n1/e f.JPEG, n1/g.JPEG; "
        "t.tar: broken (y): s/7.jpg"
    )
    ledger = Ledger(tmp_path, share=0.5, least=9)
    ledger.add("n", 12, [(i, BadRow(reason, where, detail)) for i, (where, reason, detail) in enumerate(bad)])
    rows = ["a.jsonl: 4 (broken 2, missing 2)", "b.jsonl: 1 (broken 1)", "00001.arrayrecord: 1 (damaged 1)"]
    assert ledger.summary() == [*rows, "t.tar: 1 (broken 1)", "2 files: broken"]
    with pytest.raises(TooManyBadRowsError, match="9 of the 12 rows") as error:
        ledger.check()
    assert grouped(bad) in str(error.value)
    many = summary({"where": f"{i}.jsonl line {j}", "reason": "broken"} for i in range(12) for j in range(i + 1))
    assert len(many) == 11 and many[0] == "11.jsonl: 12 (broken 12)" and many[-1] == "and 3 of 2 more files"


def test_too_many_bad_rows_stop_the_run_with_the_list(tmp_path):
    task = count()
    bad = {int(i) for i in np.arange(0, task.rows("train"), 10)}
    mixture = Mixture({"n": Flawed(task, bad)}, {"n": 20}, 0, ledger=Ledger(tmp_path, share=0.05, least=6))
    with pytest.raises(TooManyBadRowsError) as error:
        for _ in range(20):
            next(mixture)
    mixture.close()
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert 6 <= len(lines) < 12 and {line["row"] for line in lines} <= bad
    listed = ", ".join(f"row {line['row']}" for line in lines[:10])
    assert f"broken (as planned): {listed};" in str(error.value)
    assert "data.max_bad.share" in str(error.value) and "skipped.jsonl" in str(error.value)

    few = Ledger(share=0.05, least=6)  # few, although their share is large; then many, but a small share
    few.add("n", 5, [(i, BadRow("broken")) for i in range(5)])
    few.check()
    few.add("n", 1000, [(i, BadRow("broken")) for i in range(45)])
    few.check()
    few.add("n", 1, [(9, BadRow("broken"))])
    with pytest.raises(TooManyBadRowsError, match="51 of the 1006 rows"):
        few.check()


def test_processes_stop_together_and_count_rows_that_two_of_them_read_once(monkeypatch):
    each = [Ledger(share=0.1, least=3) for _ in range(3)]
    for ledger, (read, bad) in zip(each, [(40, 1), (40, 2), (40, 2)], strict=True):
        ledger.add("n", read, [(i, BadRow("broken", f"{read} {bad} {i}")) for i in range(bad)])
    texts = []
    monkeypatch.setattr(ledgers, "gather_texts", lambda text: texts.append(text) or [text])
    for ledger, shard in zip(each, (0, 1, 1), strict=True):
        ledger.settle(shard)
    monkeypatch.setattr(ledgers, "gather_texts", lambda text: texts)
    assert [ledger.settle() for ledger in each[:1]] == [{"data/skipped/n": 2.0}]  # 3 in all, 1 was told before
    monkeypatch.setattr(ledgers.jax, "process_count", lambda: 3)
    for ledger in each:
        ledger.share, ledger.least = 0.02, 1
        ledger.check()  # alone nobody stops, even one that has too many
        with pytest.raises(TooManyBadRowsError, match=r"3 of the 80 rows .*40 1 0.*40 2 1"):
            ledger.settle()


def test_the_ordered_pass_skips_bad_rows_and_fillings():
    task = say()
    batches = [batch.tokens for batch in ordered(Flawed(task, {2}), "test", 7 * 16)]
    learned = np.concatenate([b["text.caption"].target.any(axis=1) for b in batches])
    assert (np.flatnonzero(~learned[:360]) == 2).all() and learned[:360].sum() == 359 and not learned[360:].any()
    assert not batches[0]["text.head"].valid[2].any() and batches[0]["image"].valid.all()


def test_a_flaw_travels_whole_or_cut():
    flaw = BadRow("not\njson", "a/b.jsonl line 3", "x\ny")
    assert vars(BadRow.unpack(flaw.pack())) == vars(flaw) and str(flaw) == "a/b.jsonl line 3: not json (x y)"
    long = BadRow("ü" * 999, "w" * 999 + "end", "é" * 999).pack()
    assert long.shape == (FLAW_BYTES,) and BadRow.unpack(long).where.endswith("end")
    assert BadRow.unpack(BadRow("r", "\udcff", "\0").pack()).reason == "r"


def test_a_row_that_takes_long_is_named(caplog):
    """The stalled loader (25) and the slow one (26)."""

    class Slow(Flawed):
        def read(self, split, index, uniforms=None):
            time.sleep(0.5 * (index == 17))
            return super().read(split, index, uniforms)

    caplog.set_level(logging.WARNING)
    task = count()
    mixture = Mixture({"n": Slow(task, ())}, {"n": 8}, 0, prefetch=1)
    mixture.waits.patience = 0.1
    for _ in range(-(-task.rows("train") // 8)):
        next(mixture)
    assert mixture.waits.told() == "" and mixture.waits.seconds["n"] > 0.3
    mixture.close()
    told = [r.getMessage() for r in caplog.records if "(row 17 of its data is being read)" in r.getMessage()]
    assert all("task n waits for rows" in t for t in told)
    assert 1 <= len(told) <= 6  # after 0.1 s, 0.2 s, 0.4 s, and not each of the 20 times that it looked


def test_a_path_that_looks_like_a_place_is_a_path():
    assert parted("my set line 2/train.jsonl line 5") == ("my set line 2/train.jsonl", "line 5")
    assert parted("a line 3 b/c.JPEG") == ("", "a line 3 b/c.JPEG")
    assert parted("n01/x line 3.JPEG") == ("", "n01/x line 3.JPEG")
    assert parted("train.jsonl line 3 turns 1 to 2") == ("train.jsonl", "line 3 turns 1 to 2")


@pytest.mark.parametrize(
    ("sound", "share", "refused"),
    [(0, 0.05, True), (0, 1.0, True), (0.02, 0.05, True), (0.08, 1.0, False), (0.5, 0.05, False), (1, 0.0, False)],
)
def test_a_source_that_cannot_be_read_is_refused_at_its_first_rows(sound, share, refused):
    task = count()
    rows = task.rows("train")
    bad = {row for row in range(rows) if row % 100 >= 100 * sound}
    read, flawed = [], Flawed(task, bad)
    flawed.read = lambda split, index, uniforms=None: read.append(index) or Flawed.read(flawed, split, index, uniforms)
    if not refused:
        check_rows("count", flawed, share=share)
        assert len(read) <= (8 if sound == 0.5 else 4 if sound == 1 else LOOKED)
        return
    with pytest.raises(TooManyBadRowsError) as error:
        check_rows("count", flawed, share=share)
    said = str(error.value)
    assert len(set(read)) == len(read) == LOOKED and f"task count: {len(bad & set(read))} of 32 rows" in said
    assert (
        said.count("row ") == 3 and "broken (as planned): row" in said and "mend the data" in said and "\n" not in said
    )


def test_a_small_source_and_rows_of_which_something_is_left(tmp_path):
    class Four(Flawed):
        def rows(self, split):
            return 4

        def read(self, split, index, uniforms=None):
            try:
                return super().read(split, index, uniforms)
            except BadRow as flaw:
                raise BadRow(flaw.reason, flaw.where, rest=self.rest) from flaw

    four = Four(count(), range(4))
    four.rest = None
    with pytest.raises(TooManyBadRowsError, match="4 of 4 rows"):
        check_rows("t", four)
    four.rest = {"text.sentence/ids": np.zeros(1)}  # of a packed row in which one example is bad
    check_rows("t", four)
    four.rest, four._bad = None, range(3)
    check_rows("t", four)
