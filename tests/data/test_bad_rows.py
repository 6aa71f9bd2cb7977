"""A bad row keeps its place and counts nothing, moves no other row, and is reported once; too many stop the run."""

import json
import logging
import time

import jax
import numpy as np
import pytest

from src.codecs.text import Bytes
from src.data import flaws
from src.data.digits import CaptionToImage, ImageToCaption, NumberSentences
from src.data.pipeline import bad_rows as ledgers
from src.data.pipeline.bad_rows import FLAW_BYTES, BadRow, Ledger, TooManyBadRowsError
from src.data.pipeline.stream import Mixture, Stream, ordered
from src.interfaces import ImageField, LabelField, TokenField

BAD = {3, 11, 12, 200, 201, 202, 203}


class Flawed:
    """A task some of whose rows are bad."""

    def __init__(self, task, bad=frozenset(BAD)):
        self._task, self._bad = task, bad

    def __getattr__(self, name):
        if name.startswith("__") or "_task" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self._task, name)

    def read(self, split, index):
        if index in self._bad:
            raise BadRow("broken", f"row {index}", "as planned")
        return self._task.read(split, index)


def leaves(fields):
    return {(n, k): np.asarray(v) for n, f in fields.items() for k, v in vars(f).items() if v is not None}


@pytest.mark.parametrize("make", [CaptionToImage, ImageToCaption, NumberSentences])
def test_other_rows_are_what_they_would_be_and_the_bad_ones_are_zeros(make):
    task = make(Bytes())
    rows = task.rows("train")
    bad = set(range(0, rows, 7))
    whole, flawed = Stream(task, 24, seed=1), Stream(Flawed(task, bad), 24, seed=1, ledger=Ledger(share=1))
    parts = [Stream(Flawed(task, bad), 24, seed=1, shard=(i, 2), ledger=Ledger(share=1)) for i in range(2)]
    met = 0
    for _ in range(3):
        clean, found = leaves(next(whole)), leaves(next(flawed))
        halves = [leaves(next(part)) for part in parts]
        valid = next(v for (_, k), v in found.items() if k == "valid" and v.ndim == 2).any(1)
        met += (~valid).sum()
        for key, leaf in found.items():
            np.testing.assert_array_equal(leaf[valid], clean[key][valid], err_msg=str(key))
            assert not leaf[~valid].any() and leaf.dtype == clean[key].dtype, key
            np.testing.assert_array_equal(leaf, np.concatenate([half[key] for half in halves]))
    assert met == flawed._ledger.skipped["data"] == sum(part._ledger.skipped["data"] for part in parts) > 0
    for stream in (whole, flawed, *parts):
        stream.close()


def test_a_batch_of_bad_rows_only_has_the_shape_of_any_other():
    for make in (CaptionToImage, ImageToCaption, NumberSentences):
        task = make(Bytes())
        stream = Stream(Flawed(task, range(10**6)), 4, seed=0, ledger=Ledger(share=1))
        fields = next(stream)
        stream.close()
        spec = task.element_spec(4)
        same = jax.tree.map(lambda leaf, want: (leaf.shape, leaf.dtype) == (want.shape, want.dtype), fields, spec)
        assert jax.tree.all(same) and not any(leaf.any() for leaf in jax.tree.leaves(fields))


def test_each_bad_row_is_written_down_once_whatever_the_epochs_and_restarts(tmp_path):
    task = Flawed(NumberSentences(Bytes(), relations=("successor",)), {1, 4})
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
    assert flaws.grouped(bad) == (
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
    assert flaws.grouped(bad) in str(error.value)
    many = flaws.summary({"where": f"{i}.jsonl line {j}", "reason": "broken"} for i in range(12) for j in range(i + 1))
    assert len(many) == 11 and many[0] == "11.jsonl: 12 (broken 12)" and many[-1] == "and 3 of 2 more files"


def test_too_many_bad_rows_stop_the_run_with_the_list(tmp_path):
    task = NumberSentences(Bytes())
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
    task = ImageToCaption(Bytes())
    batches = list(ordered(Flawed(task, {2}), "test", 7 * 16))
    image = np.concatenate([b["image"].valid for b in batches])
    assert (np.flatnonzero(~image[:360]) == 2).all() and image[:360].sum() == 359 and not image[360:].any()
    assert not batches[0]["caption"].loss[2].any() and not batches[0]["head"].valid[2].any()


def test_a_flaw_travels_whole_or_cut():
    flaw = BadRow("not\njson", "a/b.jsonl line 3", "x\ny")
    assert vars(BadRow.unpack(flaw.pack())) == vars(flaw) and str(flaw) == "a/b.jsonl line 3: not json (x y)"
    long = BadRow("ü" * 999, "w" * 999 + "end", "é" * 999).pack()
    assert long.shape == (FLAW_BYTES,) and BadRow.unpack(long).where.endswith("end")
    assert BadRow.unpack(BadRow("r", "\udcff", "\0").pack()).reason == "r"


def test_a_row_that_takes_long_is_named(caplog):
    """The stalled loader (25) and the slow one (26)."""

    class Slow(Flawed):
        def read(self, split, index):
            time.sleep(0.5 * (index == 17))
            return {}

    caplog.set_level(logging.WARNING)
    task = NumberSentences(Bytes())
    mixture = Mixture({"n": Slow(task)}, {"n": 8}, 0, prefetch=1)
    mixture.waits.patience = 0.1
    for _ in range(-(-task.rows("train") // 8)):
        next(mixture)
    assert mixture.waits.told() == "" and mixture.waits.seconds["n"] > 0.3
    mixture.close()
    told = [r.getMessage() for r in caplog.records if "(row 17 of the source is being read)" in r.getMessage()]
    assert all("task n waits for rows" in t for t in told)
    assert 1 <= len(told) <= 6  # after 0.1 s, 0.2 s, 0.4 s, and not each of the 20 times that it looked


def test_kinds_of_fields():
    """A source of every kind of field: what is not valid is zero in each."""

    class All:
        draws = 0

        def rows(self, split):
            return 8

        def read(self, split, index):
            if index % 2:
                raise BadRow("odd")
            return {"x": np.full((2, 2, 1), index + 1.0)}

        def blank(self):
            return {"x": np.full((2, 2, 1), np.nan)}

        def build(self, split, index, uniforms, extra):
            ids = np.repeat(index[:, None] + 1, 3, 1).astype(np.int32)
            text = TokenField(ids, ids > 0, ids > 0)
            return {"t": text, "i": ImageField(extra["x"]), "l": LabelField(index.astype(np.int32) + 1)}

    batch = next(ordered(All(), "test", 8))
    for leaf in jax.tree.leaves(batch):
        assert not leaf[1::2].any() and leaf[::2].all()


def test_a_path_that_looks_like_a_place_is_a_path():
    assert flaws.parted("my set line 2/train.jsonl line 5") == ("my set line 2/train.jsonl", "line 5")
    assert flaws.parted("a line 3 b/c.JPEG") == ("", "a line 3 b/c.JPEG")
    assert flaws.parted("n01/x line 3.JPEG") == ("", "n01/x line 3.JPEG")
    assert flaws.parted("train.jsonl line 3 turns 1 to 2") == ("train.jsonl", "line 3 turns 1 to 2")
